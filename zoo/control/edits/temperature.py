"""Sharper or softer attention: a temperature of the softmax."""

from __future__ import annotations

from dataclasses import replace

from ...sites import Call, Schedule
from ..channels import scale_of
from ..edit import Context, Edit
from ..where import Where


class Temperature(Edit):
    """`softmax(logits / temperature)`.

    Args:
        temperature: above 0; 1 is neutral, below 1 is sharper.
        where, schedule: sites and steps. All rows are edited.

    Raises:
        ValueError: a temperature of 0 or less.
    """

    guidance = "both"

    def __init__(self, temperature: float, *, where: Where | None = None, schedule: Schedule | None = None):
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        self.temperature = temperature
        self.where, self.schedule = where or Where(kinds=("self",)), schedule or Schedule()

    def plan(self, context: Context) -> float | None:
        return None if self.temperature == 1 else self.temperature

    def qkv(self, call: Call, plan: float) -> Call:
        return replace(call, scale=scale_of(call) / plan)
