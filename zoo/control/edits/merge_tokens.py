"""Fewer tokens in self-attention: similar ones are merged before and copied back after (ToMe)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...sites import Call, Schedule
from ...token_merging import Matching, random_destinations
from ..edit import Context, Edit
from ..where import Where


class MergeTokens(Edit):
    """Self-attention over merged tokens of the grid (arXiv:2303.17604), after projections and rotary embeddings.

    Queries, keys and values of merged tokens are averaged; each merged query gets the output of its destination. Rows
    of the batch are matched each for itself.

    Args:
        ratio: share of the tokens that is merged, in 0..1; 0 is neutral. At most all but the destinations.
        cell: rows and columns of a cell, with one destination each.
        log_size: whether a merged key counts as often as it has tokens.
        seed: of the destinations; None takes the first token of each cell.
        where, schedule: sites and steps. All rows are edited.

    Raises:
        ValueError: a ratio outside of 0..1.
    """

    owner = True
    guidance = "both"

    def __init__(
        self,
        ratio: float = 0.5,
        *,
        cell: tuple[int, int] = (2, 2),
        log_size: bool = False,
        seed: int | None = None,
        where: Where | None = None,
        schedule: Schedule | None = None,
    ):
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio={ratio} must be in 0..1, 1 excluded")
        self.ratio, self.cell, self.log_size, self.seed = ratio, cell, log_size, seed
        self.where, self.schedule = where or Where(kinds=("self",)), schedule or Schedule()

    def plan(self, context: Context) -> Any:
        grid = context.layout.grid_of(context.site)
        if self.ratio == 0 or grid is None or any(n < c for n, c in zip(grid[-2:], self.cell, strict=True)):
            return None
        return context, self.destinations(grid)

    def destinations(self, grid: Sequence[int]) -> Tensor:
        """Destination tokens, bool `[tokens]`, the same in every frame."""
        if self.seed is None:
            plane = torch.zeros(tuple(grid[-2:]), dtype=torch.bool)
            plane[:: self.cell[0], :: self.cell[1]] = True
            plane = plane.flatten()
        else:
            generator = torch.Generator().manual_seed(self.seed)
            plane = random_destinations(tuple(grid[-2:]), self.cell, generator)  # type: ignore[arg-type]
        return plane.repeat(grid[0]) if len(grid) == 3 else plane

    def attend(self, call: Call, plan: Any, rows: Sequence[int], following: Callable[[Call], Tensor]) -> Tensor:
        context, destinations = plan
        whole = (0, len(destinations))
        if any(context.span(call, "image", keys=k) != whole for k in (False, True)) or call.mask is not None:
            return following(call)  # tokens that are not on the grid, or hidden ones
        source = call.query if call.hidden_states is None else call.hidden_states
        source = source if source.shape[0] == call.query.shape[0] else call.query
        merging = Matching(source.flatten(2), destinations).merging(int(self.ratio * len(destinations)))
        parts = {name: getattr(call, name) for name in ("query", "key", "value")}
        sizes = {name: x.shape[2:] for name, x in parts.items()}
        merged = {name: merging.merge(x.flatten(2)).unflatten(2, sizes[name]) for name, x in parts.items()}
        mask = None
        if self.log_size:
            dtype = torch.promote_types(call.query.dtype, torch.float32)
            ones = torch.zeros(len(merging.merged), len(destinations), 1, device=call.query.device, dtype=dtype)
            joined = ones.new_ones(merging.target.shape)
            count = ones.new_ones(len(ones), len(merging))
            first = merging.kept.shape[1]
            count[:, first:] = count[:, first:].scatter_add(1, merging.target, joined)
            mask = count.log()[:, None, None].to(call.query)
        out = following(replace(call, **merged, mask=mask))
        return merging.unmerge(out.flatten(2)).unflatten(2, out.shape[2:])
