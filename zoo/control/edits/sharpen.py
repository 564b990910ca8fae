"""Logits of pairs of one region raised towards their highest, all others lowered towards their lowest (VideoGrain)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...sites import Call, Schedule
from ..channels import row_extremes, with_bias
from ..edit import Context, Edit
from ..regions import check_regions, regions_to_grid
from ..where import Where


class Sharpen(Edit):
    """`s <- (1 - c) s + c max(s)` for pairs of one region, `(1 - c) s + c min(s)` for all others, row by row.

    `c = strength * fade(noise) * (1 - share of the query's region)`. Since a constant on a row has no effect, this is
    the query times `1 - c` and one channel more for each region with `c (max - min)`: no map is made, but logits are
    passed once more, by pieces, for their extremes.

    Args:
        regions: masks `[regions, height, width]` or `[regions, frames, height, width]`, disjoint.
        words: words of the regions, for attention to text; None for attention of the grid to itself.
        strength: factor; 0 is neutral.
        fade: factor by the noise level in 0..1.
        parity: whether the share of a region over a whole video is divided by the frames once more, as in the official
            code of VideoGrain.
        where, schedule, guidance: sites, steps and rows.

    Raises:
        ValueError: regions that overlap, or other than one word for each.
    """

    def __init__(
        self,
        regions: Tensor,
        words: Sequence[str] | None = None,
        *,
        strength: float = 1.0,
        fade: Callable[[float], float] | None = None,
        parity: bool = False,
        where: Where | None = None,
        schedule: Schedule | None = None,
        guidance: str = "cond",
    ):
        check_regions(regions)
        if (regions.float().sum(0) > 1).any():
            raise ValueError("regions must not overlap")
        if words is not None and len(words) != len(regions):
            raise ValueError(f"words={tuple(words)} must be one for each of the {len(regions)} regions")
        self.regions, self.strength, self.fade, self.cross = regions, strength, fade, words is not None
        self.parity = parity
        self.words = tuple(words or ())
        kinds = ("cross", "joint") if self.cross else ("self", "joint")
        self.where, self.schedule, self.guidance = where or Where(kinds=kinds), schedule or Schedule(), guidance

    def plan(self, context: Context) -> tuple | None:
        now = self.strength * (1.0 if self.fade is None else self.fade(context.moment.noise or 0.0))
        return None if now == 0 else (context, context.rows.of(None, self.guidance), now)

    def qkv(self, call: Call, plan: tuple) -> Call:
        context, rows, now = plan
        queries = context.span(call, "image", keys=False)
        keys = context.span(call, "text" if self.cross else "image", keys=True)
        grid = context.layout.grid_of(context.site)
        if queries is None or keys is None or grid is None:
            return call
        device = call.query.device
        shares = regions_to_grid(self.regions, grid).to(device).T  # [tokens, regions]
        mine = torch.zeros(call.query.shape[1], len(self.regions), device=device)
        theirs = torch.zeros(call.key.shape[1], len(self.regions), device=device)
        mine[queries[0] : queries[1]] = shares
        if self.cross:
            for region, word in enumerate(self.words):
                theirs[context.places_of([word], keys), region] = 1
        else:
            theirs[keys[0] : keys[1]] = shares
        on = torch.zeros(context.rows.batch, device=device)
        on[list(rows)] = 1
        on = on.repeat_interleave(call.query.shape[0] // context.rows.batch)[:, None, None]
        changed = torch.zeros(call.query.shape[1], device=device)
        changed[queries[0] : queries[1]] = now * self.sizes(shares, grid)
        return sharpen(call, mine, theirs, changed[:, None] * on)

    def sizes(self, shares: Tensor, grid: Sequence[int]) -> Tensor:
        """1 minus the share of the grid that each token's region takes; of its frame in attention to text.

        Args:
            shares: membership of the grid's tokens, `[tokens, regions]`.
            grid: of the tokens.
        """
        frames = grid[0] if len(grid) == 3 else 1
        by_frame = shares.unflatten(0, (frames if self.cross else 1, -1))
        taken = by_frame.mean(1, keepdim=True) / (frames if self.parity and not self.cross else 1)
        return 1 - (by_frame * taken).sum(-1).flatten()


def sharpen(call: Call, mine: Tensor, theirs: Tensor, strength: Tensor) -> Call:
    """The operation sharpened.

    Args:
        call: the operation.
        mine, theirs: membership `[queries, regions]` and `[keys, regions]`, 0 or 1, at most one region each.
        strength: c, `[B or 1, queries, heads or 1]`, in 0..1.
    """
    c = strength.to(call.query)
    low, high = row_extremes(call)
    lift = c * (high - low).to(c)
    return with_bias(call, lift[..., None] * mine[:, None].to(c), theirs[:, None], (1 - c)[..., None])
