"""Schedule of an interception: steps, noise levels, layers, heads and branches; and the clock that counts steps.

Steps are decided before the model runs. A step number that is read inside a compiled block would compile the block
anew at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Bound = float | int | None
BRANCHES = ("cond", "uncond")


@dataclass(frozen=True)
class Moment:
    """Moment of a forward.

    Attributes:
        step: number of the denoising step, from 0 on; None when it was not read.
        total: steps of the run; None when unknown.
        noise: level of the noise in 0..1, of training timesteps for models that are not flows; None if not read.
        rows: batch entries of each branch of guidance, "cond" and "uncond"; a branch that is not there is missing.
            None when unknown.
    """

    step: int | None = None
    total: int | None = None
    noise: float | None = None
    rows: Mapping[str, slice] | None = None


@dataclass(frozen=True)
class Schedule:
    """Steps, layers, heads and branches in which an interception acts.

    Attributes:
        steps: first step and end (half-open), integers or fractions of the run in 0..1 as floats; None is open.
            Fractions are rounded, and a fraction above 0 is at least one step. Negative integers count from the end.
        noise: lowest and highest level of the noise in 0..1, both included.
        layers: numbers of layers, negative ones from the last.
        heads: numbers of heads, from 0 on.
        branches: "cond", "uncond" or both.

    Raises:
        ValueError: a value out of range.
    """

    steps: tuple[Bound, Bound] | None = None
    noise: tuple[float, float] | None = None
    layers: Collection[int] | None = None
    heads: Collection[int] | None = None
    branches: Collection[str] | None = None

    def __post_init__(self) -> None:
        for bound in self.steps or ():
            check_bound("steps", bound)
        if self.steps is not None and len(self.steps) != 2:
            raise ValueError(f"steps={self.steps!r} must be a first step and an end")
        if self.noise is not None and not (len(self.noise) == 2 and 0 <= self.noise[0] <= self.noise[1] <= 1):
            raise ValueError(f"noise={self.noise!r} must be a lowest and a highest level in 0..1")
        if self.branches is not None and (set(self.branches) - set(BRANCHES) or not self.branches):
            raise ValueError(f"branches={self.branches!r} must be some of {BRANCHES}")

    @property
    def needs_time(self) -> bool:
        """True if the timestep has to be read."""
        return self.steps is not None or self.noise is not None

    def active(self, moment: Moment) -> bool:
        """Return True if the step and the noise level of a forward are inside.

        Raises:
            ValueError: a fraction of steps, or a step from the end, of a run whose number of steps is unknown.
        """
        if self.noise is not None and not self.noise[0] <= (moment.noise or 0.0) <= self.noise[1]:
            return False
        if self.steps is None:
            return True
        first, end = (step_number(bound, moment.total) for bound in self.steps)
        step = moment.step or 0
        return (first is None or step >= first) and (end is None or step < end)


def check_bound(name: str, bound: Bound) -> None:
    """Raises ValueError unless a bound is None, an integer, or a float in 0..1."""
    integer = isinstance(bound, int) and not isinstance(bound, bool)
    if bound is None or integer or (isinstance(bound, float) and 0 <= bound <= 1):
        return
    raise ValueError(f"{name}={bound!r} must be an integer, a fraction of the run in 0..1 as a float, or None")


def step_number(bound: Bound, total: int | None) -> int | None:
    """A bound as a number of steps.

    Raises:
        ValueError: it needs the number of steps of the run, and that is unknown.
    """
    if bound is None or (isinstance(bound, int) and bound >= 0):
        return bound
    if total is None:
        raise ValueError(
            f"steps={bound!r} counts in steps of a run, whose number this model does not know: give the pipeline "
            "instead of its model, or total_steps="
        )
    if isinstance(bound, int):
        return total + bound
    return max(round(bound * total), 1) if bound > 0 else 0


class Clock:
    """Counts the steps of a run by the timesteps that its models are given.

    Noise that falls is the next step, noise that rises is a new run, equal noise is the same step: the branches of
    guidance, and solvers that look twice, share it. One clock serves all transformers of a pipeline.

    Args:
        pipe: pipeline that is asked for the number of steps; None for a model of its own.
        total: the number of steps where no pipeline tells it.
    """

    def __init__(self, pipe: Any = None, total: int | None = None):
        self.pipe, self.given = pipe, total
        self.step, self.noise = 0, None

    def total(self) -> int | None:
        """Number of steps of the run."""
        if self.given is not None or self.pipe is None:
            return self.given
        counted = getattr(self.pipe, "_num_timesteps", None)
        timesteps = getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)
        return counted or (len(timesteps) if timesteps is not None else None)

    def see(self, noise: float, context: Context | None) -> tuple[int, int | None]:
        """Number of the step at this level of noise, and of steps in all."""
        details = {} if context is None else context.details
        if details.get("step_index") is not None:
            self.step = int(details["step_index"])
        elif self.noise is None or noise > self.noise:
            self.step = 0
        elif noise < self.noise:
            self.step += 1
        self.noise = noise
        return self.step, details.get("num_inference_steps") or self.total()


@dataclass
class Context:
    """Facts of a call that a pipeline gives by `cache_context`: the name of the branch and, in some, the step."""

    name: str
    details: dict[str, Any]


class ContextRecorder:
    """Stands before the `cache_context` of a model and notes what it is given; several interceptions share it."""

    def __init__(self, original: Callable[..., Any]):
        self.original, self.users = original, 0
        self.now: Context | None = None

    @contextmanager
    def __call__(self, name: str, **details: Any):
        before, self.now = self.now, Context(name, details)
        try:
            with self.original(name, **details):
                yield
        finally:
            self.now = before


def noise_level(timestep: Any, scale: float, *, rises: bool) -> float:
    """Level of the noise in 0..1 of a timestep, the highest where tokens have their own.

    Args:
        timestep: tensor or number.
        scale: timestep of pure noise.
        rises: whether timesteps grow towards the data.
    """
    value = float(timestep.detach().max() if isinstance(timestep, Tensor) else torch.as_tensor(timestep).max())
    return 1 - value / scale if rises else value / scale


def branch_rows(context: Context | None, batch: int, guided: bool | None) -> dict[str, slice] | None:
    """Batch entries of the branches of guidance.

    Args:
        context: of the call, if the pipeline gave one.
        batch: entries of the batch.
        guided: whether the pipeline guides; None without a pipeline.

    Returns:
        Rows by branch; None when nothing tells.
    """
    name = None if context is None else context.name
    if name in BRANCHES:
        return {name: slice(0, batch)}
    if guided is None:
        return None
    if not guided:
        return {"cond": slice(0, batch)}
    if batch % 2:
        return None
    return {"uncond": slice(0, batch // 2), "cond": slice(batch // 2, batch)}
