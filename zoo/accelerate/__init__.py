"""Sparse attention inside the generators of diffusers: plans, what they cost, what they keep.

from foveal.zoo import accelerate
from foveal.zoo.accelerate import explain, measure, tune

print(explain(pipe, height=480, width=832, frames=81, plan={"window": (6, 16, 16), "stride": (1, 8, 8)}))
accelerate(pipe, {"window": (6, 16, 16), "stride": (1, 8, 8)}, dense_steps=0.2)
"""

from .acceleration import Acceleration, accelerate, decelerate
from .explain import PlanCost, explain
from .gates import load_gates
from .measure import Measurement, measure
from .plan import Plan, read_plan
from .presets import PRESETS
from .tune import tune

__all__ = [
    "PRESETS",
    "Acceleration",
    "Measurement",
    "Plan",
    "PlanCost",
    "accelerate",
    "decelerate",
    "explain",
    "load_gates",
    "measure",
    "read_plan",
    "tune",
]
