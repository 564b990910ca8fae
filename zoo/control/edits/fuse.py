"""Regions that are attended for by branches of their own, put together (RAG)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...sites import Call, Schedule
from ..edit import Context, Edit
from ..regions import regions_to_grid
from ..where import Where


def compose_regions(base: Tensor, parts: Sequence[Tensor], masks: Tensor, delta: float) -> Tensor:
    """`(1 - delta) base + delta sum_r mask_r part_r`, tokens `[B, tokens, …]`, masks `[regions, tokens]`.

    Tokens in no region keep the base.
    """
    masks = masks.to(base)
    shape = (1, -1, *[1] * (base.dim() - 2))
    covered = masks.sum(0).clamp(max=1).reshape(shape)
    whole = (1 - covered) * base
    for part, mask in zip(parts, masks, strict=True):
        whole = whole + mask.reshape(shape) * part
    return torch.lerp(base, whole, delta)


class Fuse(Edit):
    """The image of one branch attends with the text of other branches, each in its region (regional soft refinement).

    The regions' branches carry their words; their image is that of the base branch in every attention.

    Args:
        base: branch that is made.
        regions: branches with the words of each region.
        masks: `[regions, height, width]`.
        delta: share of the composed regions; 0 is neutral.
        where, schedule, guidance: sites, steps and rows.

    Raises:
        ValueError: other than one mask for each region, or delta outside of 0..1.
    """

    def __init__(
        self,
        base: str,
        regions: Sequence[str],
        masks: Tensor,
        *,
        delta: float = 1.0,
        where: Where | None = None,
        schedule: Schedule | None = None,
        guidance: str = "cond",
    ):
        if len(masks) != len(regions) or not 0 <= delta <= 1:
            raise ValueError(
                f"regions={tuple(regions)} need {len(regions)} masks, got {len(masks)}; delta={delta} 0..1"
            )
        self.base, self.regions, self.masks, self.delta = base, tuple(regions), masks, delta
        self.where, self.schedule = where or Where(kinds=("cross", "joint")), schedule or Schedule()
        self.guidance, self.branches = guidance, (base, *regions)

    def plan(self, context: Context) -> tuple | None:
        if self.delta == 0:
            return None
        rows = [context.rows.of(name, self.guidance) for name in self.branches]
        return context, rows

    def qkv(self, call: Call, plan: tuple) -> Call:
        context, (base, *regions) = plan
        changes = {}
        for name, keys in (("query", False), ("key", True), ("value", True)):
            x, span = getattr(call, name), context.span(call, "image", keys=keys)
            if span is None:
                continue
            x = x.clone()
            for rows in regions:
                x[list(rows), span[0] : span[1]] = x[list(base), span[0] : span[1]]
            changes[name] = x
        return replace(call, **changes)

    def out(self, call: Call, plan: tuple, out: Tensor) -> Tensor:
        context, (base, *regions) = plan
        span, grid = context.span(call, "image", keys=False), context.layout.grid_of(context.site)
        if span is None or grid is None:
            return out
        tokens = slice(*span)
        parts = [out[list(rows), tokens] for rows in regions]
        out = out.clone()
        out[list(base), tokens] = compose_regions(
            out[list(base), tokens], parts, regions_to_grid(self.masks, grid), self.delta
        )
        return out
