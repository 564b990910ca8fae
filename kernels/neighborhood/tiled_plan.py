"""How the tiled path cuts a grid: which queries form a tile, which box of keys a tile reads, who sees whom inside.

An axis with dilation is cut into its dilation groups first, so a tile is a run of neighbouring positions of one group on
every axis, and its box is the run of positions that holds the windows of them all. Everything is a small table per
axis; the tables of a whole tile are combined when a chunk of tiles is computed.
"""

from collections.abc import Callable
from functools import lru_cache, reduce
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_map_only

from .geometry import Axis, group_length, window_bounds

TILES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 96, 128)
CLASS_ELEMENTS = 1 << 18  # a mask table shared by all tiles of a class may hold this many


class AxisTiles(NamedTuple):
    """Tables of one axis, a row per tile; t queries and k keys a tile."""

    query: Tensor  # [n, t] coordinates
    key: Tensor  # [n, k] coordinates
    first: Tensor  # [n, t] first slot of the box that a query sees
    last: Tensor  # [n, t] the slot after the last
    offset: Tensor  # [n, t] bias entry of slot 0
    valid: Tensor  # [n, t] False where a query only fills up its tile


class Classes(NamedTuple):
    """Tiles that look alike share one mask: most tiles of a grid lie inside it, the others at a border."""

    of_tile: Tensor  # [tiles] class of each tile
    visible: Tensor  # [classes, q, k] bool
    entries: Tensor  # [classes, q, k less extra] int64 bias entries


class Plan(NamedTuple):
    """A grid cut into tiles. Without `classes`, masks and bias entries are made for the tiles of a chunk."""

    axes: tuple[Axis, ...]
    tables: tuple[AxisTiles, ...]
    grid: tuple[int, ...]  # tiles per axis
    tile: tuple[int, ...]  # queries of a tile per axis
    box: tuple[int, ...]  # keys of a tile per axis
    extra: int  # keys after those of the box, seen by every query
    dense: bool  # every query sees every key of its box
    classes: Classes | None

    @property
    def tiles(self) -> int:
        return prod(self.grid)

    @property
    def queries(self) -> int:
        return prod(self.tile)

    @property
    def keys(self) -> int:
        return prod(self.box) + self.extra


@lru_cache(maxsize=4096)
def box_length(window: int, stride: int, causal: bool, tile: int) -> int:
    """Keys that the windows of `tile` queries hold together, at most, on an axis of any length."""
    n = window + (stride + 1) * tile
    longest = window
    for first in range(0, n - tile + 1, tile):
        lo, _ = window_bounds(first, n, window, stride, causal)
        _, hi = window_bounds(first + tile - 1, n, window, stride, causal)
        longest = max(longest, hi - lo)
    return longest


def _cost(queries: int, keys: int, head_dim: int) -> float:
    """Time of one tile in units of a logit: logits, rows gathered and scattered, and the calls of BLAS themselves."""
    return queries * keys * (1 + head_dim / 16) + 0.35 * keys * head_dim + 0.3 * queries * head_dim + 400


@lru_cache(maxsize=512)
def choose_tile(axes: tuple[tuple[int, int, bool, int], ...], group: int, head_dim: int, extra: int) -> tuple[int, ...]:
    """Queries of a tile per axis with the least cost per query.

    Args:
        axes: (window, stride, causal, positions) per axis, positions 0 where the length is not known.
        group: query heads that share a key head, so also the rows of a tile.
    """
    options = []
    for window, stride, causal, n in axes:
        sizes = sorted({t for t in (*TILES, stride, window, n) if 1 <= t <= 128 and (t <= n or not n)})
        boxes = [box_length(window, stride, causal, t) for t in sizes]
        options.append(
            [(t, min(k, n), -(-n // t) * t / n) if n else (t, k, 1.0) for t, k in zip(sizes, boxes, strict=True)]
        )

    def cost(choice) -> float:
        tile, box, waste = zip(*choice, strict=True)
        queries = prod(tile)
        return _cost(queries * group, prod(box) + extra, head_dim) * prod(waste) / queries

    candidates = (choice for choice in product(*options) if prod(t for t, _, _ in choice) <= 1024)
    return tuple(t for t, _, _ in min(candidates, key=cost))


def positions(axis: Axis) -> int:
    """Positions in the longest dilation group."""
    return -(-axis.length // axis.dilation)


def _axis_tiles(axis: Axis, tile: int, box: int, device: torch.device) -> AxisTiles:
    length, window, stride, dilation, causal = axis
    group = torch.arange(dilation, device=device)[:, None, None]
    n = group_length(length, dilation, group)  # [groups, 1, 1]
    count = -(-positions(axis) // tile)
    p = torch.arange(count * tile, device=device).view(1, count, tile)
    valid = p < n  # [groups, count, tile]
    p = torch.minimum(p, n - 1)
    lo, hi = window_bounds(p, n, window, stride, causal)
    start = torch.minimum(lo[..., :1], n - box).clamp(min=0)
    key = start + torch.arange(box, device=device)
    key = (key * dilation + group).clamp(max=length - 1)  # the box of a shorter group may end past it: never visible
    tables = (p * dilation + group, key, lo - start, hi - start, start - p + window - 1, valid)
    return AxisTiles(*(x.flatten(0, 1) for x in tables))


def tile_coordinates(plan: Plan, tiles: Tensor) -> list[Tensor]:
    """Row of each axis' tables for flat tile numbers `tiles`, C order."""
    rows = []
    for n in reversed(plan.grid):
        rows.append(tiles % n)
        tiles = tiles // n
    return rows[::-1]


def _outer(combine: Callable[[Tensor, Tensor], Tensor], parts: list[Tensor]) -> Tensor:
    """Per-axis tables `[n, *dims]` combined over the product of the axes, in C order, dim by dim."""

    def pair(a: Tensor, b: Tensor) -> Tensor:
        if a.dim() == 2:
            return combine(a[:, :, None], b[:, None, :]).flatten(1)
        return combine(a[:, :, None, :, None], b[:, None, :, None, :]).flatten(3).flatten(1, 2)

    return reduce(pair, parts)


def tile_rows(plan: Plan, tiles: Tensor) -> list[Tensor]:
    """Per axis, the row of its tables for flat (C order) tile numbers."""
    rows = []
    for n in reversed(plan.grid):
        rows.append(tiles % n)
        tiles = tiles // n
    return rows[::-1]


def tokens(plan: Plan, rows: list[Tensor], name: str) -> Tensor:
    """Flat tokens of the "query" tile or of the "key" box: int64 `[n, q or k]`."""
    parts, stride = [], 1
    for axis, table, row in zip(reversed(plan.axes), reversed(plan.tables), reversed(rows), strict=True):
        parts.append(getattr(table, name).index_select(0, row) * stride)
        stride = stride * axis.length
    return _outer(torch.add, parts[::-1])


def valid(plan: Plan, rows: list[Tensor]) -> Tensor:
    """Which queries are none that only fill up their tile: bool `[n, q]`."""
    return _outer(torch.logical_and, [t.valid.index_select(0, r) for t, r in zip(plan.tables, rows, strict=True)])


def visibility(plan: Plan, rows: list[Tensor]) -> Tensor:
    """Who sees whom: bool `[n, q, k]`."""
    parts = []
    for table, row, k in zip(plan.tables, rows, plan.box, strict=True):
        slot = torch.arange(k, device=row.device)
        first, last = (x.index_select(0, row)[..., None] for x in (table.first, table.last))
        parts.append((slot >= first) & (slot < last))
    return pad(_outer(torch.logical_and, parts), (0, plan.extra), value=True)


def bias_entries(plan: Plan, rows: list[Tensor]) -> Tensor:
    """Entry of the flattened bias table for each query and key, extra keys aside: int64 `[n, q, k]`."""
    parts, stride = [], 1
    for axis, table, row, k in zip(*(reversed(x) for x in (plan.axes, plan.tables, rows, plan.box)), strict=True):
        entry = table.offset.index_select(0, row)[..., None] + torch.arange(k, device=row.device)
        parts.append(entry.clamp(0, 2 * axis.window - 2) * stride)
        stride *= 2 * axis.window - 1
    return _outer(torch.add, parts[::-1])


def token_slots(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat tile and slot inside it of every token: int64 `[*spatial]` each."""
    tile, slot = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    for axis, t, n in zip(plan.axes, plan.tile, plan.grid, strict=True):
        i = torch.arange(axis.length, device=device)
        p = i // axis.dilation
        tile = tile[..., None] * n + (i % axis.dilation) * (n // axis.dilation) + p // t
        slot = slot[..., None] * t + p % t
    return tile, slot


def make_plan(axes: tuple[Axis, ...], tile: tuple[int, ...], extra: int, device: torch.device) -> Plan:
    """Cut the grid into tiles of `tile` queries; any size may be symbolic."""
    box = tuple(min(box_length(a.window, a.stride, a.causal, t), positions(a)) for a, t in zip(axes, tile, strict=True))
    tables = tuple(_axis_tiles(a, t, k, device) for a, t, k in zip(axes, tile, box, strict=True))
    grid = tuple(-(-positions(a) // t) * a.dilation for a, t in zip(axes, tile, strict=True))
    dense = all(a.window * a.dilation == a.length and not a.causal for a in axes)
    return Plan(axes, tables, grid, tile, box, extra, dense, None)


@lru_cache(maxsize=64)
def cached_plan(axes: tuple[Axis, ...], tile: tuple[int, ...], extra: int, device: torch.device) -> Plan:
    """`make_plan`, with classes where their masks are small."""
    plan = make_plan(axes, tile, extra, torch.device("cpu"))
    rows = tile_rows(plan, torch.arange(plan.tiles))
    pattern, patterns = torch.zeros(plan.tiles, dtype=torch.int64), 1
    for table, row in zip(plan.tables, rows, strict=True):
        unique, kind = torch.unique(torch.cat([table.first, table.last, table.offset], 1), dim=0, return_inverse=True)
        pattern, patterns = pattern * len(unique) + kind[row], patterns * len(unique)
    kinds, of_tile = torch.unique(pattern, return_inverse=True)
    if len(kinds) * plan.queries * plan.keys <= CLASS_ELEMENTS:
        example = torch.empty_like(kinds).scatter_(0, of_tile, torch.arange(plan.tiles))
        rows = tile_rows(plan, example)
        plan = plan._replace(classes=Classes(of_tile, visibility(plan, rows), bias_entries(plan, rows)))
    return tree_map_only(Tensor, lambda x: x.to(device), plan)
