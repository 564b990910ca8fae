"""Guidance scales by branch, where a pipeline knows one scale for all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...sites import Schedule
from ...sites.models import models_of
from ..edit import Context, Edit


class RowGuidance(Edit):
    """Branches with guidance scales of their own: u becomes `u' = (u (1 - g_r) + c (g_r - g)) / (1 - g)`.

    The pipeline's `u' + g (c - u')` then is `u + g_r (c - u)`.

    Args:
        scales: name of the branch → scale; branches that are missing keep the pipeline's.
        schedule: steps.
    """

    def __init__(self, scales: Mapping[str, float], *, schedule: Schedule | None = None):
        self.scales, self.branches, self.schedule = dict(scales), tuple(scales), schedule or Schedule()

    def sites(self, sites: Sequence[Any]) -> list[Any]:
        return []

    def plan(self, context: Context) -> None:
        return None

    def check(self, control: Any) -> None:
        if not hasattr(control.pipe_or_model, "components"):
            raise ValueError(f"{self} needs the pipeline, which knows its guidance scale, not its model")

    def hooks(self, control: Any) -> list[Any]:
        def after(module: Any, args: tuple, out: Any) -> Any:
            pipe, rows = control.pipe_or_model, control.rows
            if not self.now or control.only_cond:
                return None
            if not getattr(pipe, "do_classifier_free_guidance", False):
                raise ValueError(f"{self} gives branches guidance of their own, and guidance is off")
            scale = getattr(pipe, "guidance_scale", None)
            if scale is None or scale == 1 or any(name not in rows.parts for name in ("cond", "uncond")):
                raise ValueError(
                    f"{self} needs both branches of guidance in one batch and guidance_scale={scale} other than 1"
                )
            first = out[0] if isinstance(out, tuple) else out.sample
            changed = first.clone()
            for name, own in self.scales.items():
                cond, uncond = (torch.tensor(rows.of(name, part), device=first.device) for part in ("cond", "uncond"))
                mixed = (first[uncond] * (1 - own) + first[cond] * (own - scale)) / (1 - scale)
                changed[uncond] = mixed
            if isinstance(out, tuple):
                return (changed, *out[1:])
            out.sample = changed
            return out

        return [model.register_forward_hook(after) for model in models_of(control.pipe_or_model).values()]
