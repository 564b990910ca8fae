"""Masks by columns as kernels take them: packed intervals, and for each tile the tiles of the other side to visit."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.launching import cdiv
from .columns import FAR, ColumnMask


def pack(mask: ColumnMask, queries: int) -> tuple[Tensor, Tensor]:
    """Intervals `[B or 1, heads or 1, 2 x intervals, keys]`, starts and ends in turn, and positions `[queries]`, int32.

    Empty intervals become [FAR, -FAR), which no extreme of a tile is taken from.
    """
    pairs = mask.intervals()
    start, end = (torch.stack([pair[i] for pair in pairs], 2) for i in (0, 1))
    void = start >= end
    sides = start.masked_fill(void, FAR), end.masked_fill(void, -FAR)
    intervals = torch.stack([x.clamp(-FAR, FAR) for x in sides], 3).flatten(2, 3)
    return intervals.to(torch.int32).contiguous(), mask.positions(queries).clamp(-FAR, FAR).to(torch.int32).contiguous()


def _tiles(x: Tensor, tile: int) -> Tensor:
    """`x [..., tokens]` as `[..., tiles, tile]`, the last token repeated to fill the last tile."""
    count = cdiv(x.shape[-1], tile)
    index = torch.arange(count * tile, device=x.device).clamp(max=x.shape[-1] - 1)
    return x[..., index].unflatten(-1, (count, tile))


def tile_states(intervals: Tensor, positions: Tensor, query_tile: int, key_tile: int) -> Tensor:
    """State of each tile of pairs from the extremes of its intervals, as `ColumnMask.tiles` has it.

    Returns:
        int8 `[B or 1, heads or 1, query tiles, key tiles]`: 0 nothing is visible, 2 everything is and all keys exist, 1
        the mask has to be looked at.
    """
    at = _tiles(positions, query_tile)
    low, high = at.amin(-1)[:, None], at.amax(-1)[:, None]  # [query tiles, 1]
    columns = _tiles(intervals, key_tile).unflatten(2, (-1, 2))  # [B, heads, intervals, 2, key tiles, tile]
    least, most = (x[..., None, :] for x in (columns.amin(-1), columns.amax(-1)))  # […, 2, 1, key tiles]
    empty = ((most[:, :, :, 0] <= low) & (high < least[:, :, :, 1])).any(2)
    full = ((high < least[:, :, :, 0]) | (low >= most[:, :, :, 1])).all(2)
    states = torch.where(empty, 0, torch.where(full, 2, 1)).to(torch.int8)
    if intervals.shape[-1] % key_tile:
        states[..., -1].clamp_(max=1)
    return states


def tile_lists(states: Tensor) -> Tensor:
    """Per row of tiles how many to visit, then these in order: twice the number, and 1 more where a mask is needed.

    int32 `[B or 1, heads or 1, rows, 1 + columns]`.
    """
    visited = states != 0
    order = (~visited).to(torch.int8).argsort(dim=-1, stable=True)
    entries = 2 * order + (states.gather(-1, order) == 1)
    return torch.cat([visited.sum(-1, keepdim=True), entries], -1).to(torch.int32)
