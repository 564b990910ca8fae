"""Steps of a stock scheduler whose source rows reconstruct an image, without inversion (ViMAEdit)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...sites import Schedule
from ..edit import Context, Edit
from ..latents import Step, kind_of, virtual_step
from ..rows import Rows


class VirtualInversion(Edit):
    """`x̂0 <- x0 + x̂0 - x̂0[source]` in every step of the pipeline's scheduler, for any kind of prediction.

    The scheduler's `step` is stood in for while the Control is installed; latents may start as any noise, equal in all
    branches.

    Args:
        clean: latents x0 of the source, `[1, C, …]`.
        mask: where noise is added, `[height, width]`, or an edit with `value`; nowhere when None.
        eta: share of the ancestral sampler's noise, inside of the mask.
        gated: see `latents.virtual_step`.
        seed: of the noise, one for all rows.
        source: name of the branch that reconstructs.
    """

    def __init__(
        self,
        clean: Tensor,
        *,
        mask: Any = None,
        eta: float = 1.0,
        gated: bool = True,
        seed: int = 0,
        source: str = "source",
    ):
        self.clean, self.mask, self.eta, self.gated, self.seed = clean, mask, eta, gated, seed
        self.source, self.branches, self.schedule = source, (source,), Schedule()
        self._generator: torch.Generator | None = None

    def sites(self, sites: Sequence[Any]) -> list[Any]:
        return []

    def begin(self) -> None:
        self._generator = None

    def plan(self, context: Context) -> None:
        return None

    def check(self, control: Any) -> None:
        scheduler = getattr(control.pipe_or_model, "scheduler", None)
        if scheduler is None:
            raise ValueError(f"{self} changes the steps of a scheduler; give the Control the pipeline, not its model")
        kind_of(scheduler)

    def hooks(self, control: Any) -> list[Any]:
        scheduler = control.pipe_or_model.scheduler
        before = scheduler.__dict__.get("step")

        def step(
            model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, return_dict: bool = True, **options: Any
        ) -> Any:
            moved = self.move(control, scheduler, model_output, timestep, sample)
            return SimpleNamespace(prev_sample=moved) if return_dict else (moved,)

        scheduler.step = step
        return [SimpleNamespace(remove=lambda: _put_back(scheduler, before))]

    def move(self, control: Any, scheduler: Any, prediction: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """Latents after the step."""
        rows = Rows(len(sample), control.branches)
        mine = rows.of(self.source)
        source = [mine[i % len(mine)] for i in range(len(sample))]  # rows are branches, then images of each
        at = Step.of(scheduler, timestep, len(scheduler.timesteps))
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        mask, noise = self._mask(x), None
        if mask is not None:
            if self._generator is None:
                self._generator = torch.Generator().manual_seed(self.seed)
            noise = torch.randn(1, *x.shape[1:], generator=self._generator).to(x)
        clip = scheduler.config.clip_sample_range if scheduler.config.get("clip_sample") else None
        options = {"mask": mask, "noise": noise, "eta": self.eta, "gated": self.gated, "clip": clip, "source": source}
        moved = virtual_step(self.clean.to(x), x, prediction.to(x), at, kind=kind_of(scheduler), **options)
        if "_step_index" in vars(scheduler):  # schedulers that count their steps
            if scheduler._step_index is None:
                scheduler._init_step_index(timestep)
            scheduler._step_index = scheduler.step_index + 1
        return moved.to(sample.dtype)

    def _mask(self, x: Tensor) -> Tensor | None:
        if self.mask is None:
            return None
        mask = self.mask if isinstance(self.mask, Tensor) else self.mask.value
        if mask is None:
            return None
        return interpolate(mask.float()[None, None], size=x.shape[-2:]).to(x)


def _put_back(scheduler: Any, before: Callable | None) -> None:
    if before is None:
        del scheduler.step
    else:
        scheduler.step = before
