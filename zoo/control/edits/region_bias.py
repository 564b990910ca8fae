"""Soft regions: a bias of low rank on the logits, as channels of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...sites import Call, Schedule
from ..channels import with_bias
from ..edit import Context, Edit
from ..regions import regions_to_grid
from ..where import Where

MOST = 60.0  # exp(-60) is nothing beside 1, and bfloat16 still holds the logits beside it


class RegionBias(Edit):
    """`logits += strength * inside` for the words of a region: inside is 1 in the region, `outside` elsewhere.

    Args:
        regions: masks `[regions, height, width]`, bool or in 0..1.
        words: word of each region.
        strength: added inside; at most 60 in size.
        outside: added outside, such as -60 to hide the words there.
        where, schedule, guidance: sites, steps and rows.

    Raises:
        ValueError: other than one word for each region, or a bias past 60.
    """

    def __init__(
        self,
        regions: Tensor,
        words: Sequence[str],
        *,
        strength: float = 0.0,
        outside: float = 0.0,
        where: Where | None = None,
        schedule: Schedule | None = None,
        guidance: str = "cond",
    ):
        if len(words) != len(regions):
            raise ValueError(f"words={tuple(words)} must be one for each of the {len(regions)} regions")
        if max(abs(strength), abs(outside)) > MOST:
            raise ValueError(f"strength={strength} and outside={outside} must be within -{MOST:g}..{MOST:g}")
        self.regions, self.words, self.strength, self.outside = regions, tuple(words), strength, outside
        self.where, self.schedule = where or Where(kinds=("cross", "joint")), schedule or Schedule()
        self.guidance = guidance

    def plan(self, context: Context) -> tuple | None:
        neutral = self.strength == 0 and self.outside == 0
        return None if neutral else (context, context.rows.of(None, self.guidance))

    def qkv(self, call: Call, plan: tuple) -> Call:
        context, rows = plan
        queries = context.span(call, "image", keys=False)
        text = context.span(call, "text", keys=True)
        grid = context.layout.grid_of(context.site)
        if queries is None or text is None or grid is None:
            return call
        inside = regions_to_grid(self.regions, grid).T.to(call.query)
        factor = torch.zeros(context.rows.batch, call.query.shape[1], 1, len(self.words)).to(call.query)
        factor[list(rows), queries[0] : queries[1], 0] = self.outside + (self.strength - self.outside) * inside
        factor = factor.repeat_interleave(call.query.shape[0] // context.rows.batch, dim=0)
        columns = torch.zeros(call.key.shape[1], 1, len(self.words)).to(call.key)
        for region, word in enumerate(self.words):
            columns[context.places_of([word], text), 0, region] = 1
        return with_bias(call, factor, columns)
