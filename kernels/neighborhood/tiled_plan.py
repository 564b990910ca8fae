"""Plan of the tiled path: the queries of a tile, the box of keys that it reads, and the mask between them.

An axis with dilation is cut into its dilation groups first, so a tile is a run of neighbouring positions of one group
on every axis, and its box is the run of positions that holds the windows of them all. Everything is a small table per
axis; the tables of a whole tile are combined when a chunk of tiles is computed. A box whose keys would take too much
memory is cut into slabs, which a tile attends to one after the other.
"""

import math
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache, reduce
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_map_only

from ..common.calling import tracing
from ..common.symbolic import ceil_div, modulo
from .geometry import Axis, group_length, query_count, query_range, window_bounds

TILES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 96, 128)
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
MINUS_INFINITY = {torch.float32: -0x00800000, torch.float64: -0x0010000000000000}  # bits, as a signed integer
MAX_QUERIES = 1024  # of a tile
CACHED_ROWS = 1 << 17  # rows of all chunks together that are kept between calls
CLASS_ELEMENTS = 1 << 18  # a mask table shared by all tiles of a class may hold this many


class AxisTiles(NamedTuple):
    """Tables of one axis, a row per tile; t queries and k keys a tile."""

    query: Tensor  # [n, t] coordinates, counted from the first query
    key: Tensor  # [n, k] coordinates
    first: Tensor  # [n, t] first slot of the box that a query sees
    last: Tensor  # [n, t] the slot after the last
    offset: Tensor  # [n, t] bias entry of slot 0
    valid: Tensor  # [n, t] False where a query only fills up its tile


class Classes(NamedTuple):
    """Tiles that look alike share one mask: most tiles of a grid lie inside it, the others at a border."""

    of_tile: Tensor  # [tiles] class of each tile
    keep: Tensor  # [classes, q, k], see `mask_bits`
    fill: Tensor
    entries: Tensor  # [classes, q, k less extra] int64 bias entries


class Plan(NamedTuple):
    """A grid cut into tiles. Without `classes`, masks and bias entries are made for the tiles of a chunk."""

    axes: tuple[Axis, ...]
    tables: tuple[AxisTiles, ...]
    grid: tuple[int, ...]  # tiles per axis
    tile: tuple[int, ...]  # queries of a tile per axis
    box: tuple[int, ...]  # keys of a tile per axis
    slabs: int  # that a box is cut into, along its longest axis
    extra: int  # keys after those of the box, seen by every query
    uniform: bool  # every query sees every key of its box
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

    @property
    def slab_keys(self) -> int:
        """Keys of the largest slab, and those after the box."""
        return prod(self.box) // max(self.box) * -(-max(self.box) // self.slabs) + self.extra


class Slab(NamedTuple):
    """Keys that the tiles of a chunk attend to at a time, k of them a tile."""

    slots: tuple[tuple[int, int], ...]  # per axis, the first slot of the box and the one after the last
    extra: int  # how many of the last keys are no part of the box
    rows: Tensor  # [n * h * k] rows of key and value

    @property
    def keys(self) -> int:
        return prod([last - first for first, last in self.slots]) + self.extra


class Chunk(NamedTuple):
    """Some tiles and key heads; n tiles, h key heads, g query heads a key head, q queries a tile."""

    rows: list[Tensor]  # per axis, which row of the plan's tables, [n]
    kind: Tensor | None  # class of each tile, [n]
    heads: slice  # query heads
    query: Tensor  # [n * h * g * q] rows of the query
    slabs: list[Slab]
    shape: tuple[int, int, int, int]  # n, h, g, q


class Sizes(NamedTuple):
    """Sizes of a call outside of its plan: batch, key heads, and query heads that share a key head."""

    batch: int
    key_heads: int
    group: int


@lru_cache(maxsize=4096)
def box_length(window: int, stride: int, causal: bool, tile: int, anywhere: bool = False) -> int:
    """Keys that the windows of `tile` queries hold together, at most, on an axis of any length.

    Tiles begin at multiples of their size or, with `anywhere`, at any position.
    """
    n = 2 * window + (stride + 1) * tile  # every phase of tile and stride comes, away from the end
    longest = window
    for first in range(0, n - tile + 1, 1 if anywhere else tile):
        lo, _ = window_bounds(first, n, window, stride, causal)
        _, hi = window_bounds(first + tile - 1, n, window, stride, causal)
        longest = max(longest, hi - lo)
    return longest


def _cost(rows: int, keys: int, head_dim: int, slabs: int) -> float:
    """Nanoseconds for one tile, fitted on one core: products (poor with few rows), softmax, gathers, calls."""
    gathers = (0.35 * keys + 0.6 * rows * slabs) * head_dim
    return (rows + 4 * slabs) * keys * 0.05 * head_dim + 0.9 * rows * keys + gathers + 100 * slabs


def workspace(rows: int, keys: int, head_dim: int, row_copies: int, logit_copies: int) -> int:
    """Numbers held for one tile of one key head, its indices counted as two numbers a row."""
    return (rows + keys) * (row_copies * head_dim + 2) + rows * keys * logit_copies


def _fit(rows: int, box: tuple[int, ...], extra: int, head_dim: int, most: float) -> tuple[int, float]:
    """Slabs of a box that keep the workspace of the backward to `most`, and by how much as many as can be exceed it."""
    if workspace(rows, prod(box) + extra, head_dim, 4, 3) <= most:
        return 1, 0.0
    longest = max(box)
    fixed = workspace(rows, extra, head_dim, 4, 3)
    slot = workspace(rows, extra + prod(box) // longest, head_dim, 4, 3) - fixed  # one step along the longest axis
    slots = (most - fixed) // slot
    if slots < 1:
        return longest, fixed + slot - most
    return math.ceil(longest / slots), 0.0


class Cut(NamedTuple):
    """Queries of a tile and keys of its box, per axis, and the slabs that the box is cut into."""

    tile: tuple[int, ...]
    box: tuple[int, ...]
    slabs: int = 1


@torch.compiler.assume_constant_result  # a search to run, not to trace
def choose_cut(
    axes: tuple[tuple[int, int, bool, int, int], ...], group: int, head_dim: int, extra: int, most: float = math.inf
) -> Cut:
    """The cut with the least cost per query.

    Args:
        axes: (window, stride, causal, positions, positions of queries where they are a part) per axis; 0 where the
            length is not known or the queries are no part.
        group: query heads that share a key head: they stack up to rows of a product.
        most: numbers that one tile of one key head may take in the backward, where any tile keeps to that.
    """
    return _choose_cut(axes, group, head_dim, extra, most)


@lru_cache(maxsize=512)
def _choose_cut(
    axes: tuple[tuple[int, int, bool, int, int], ...], group: int, head_dim: int, extra: int, most: float
) -> Cut:
    options = []  # per axis: queries, keys, and how much of the tiles is queries
    for window, stride, causal, n, part in axes:
        rows = part or n
        sizes = sorted({t for t in (*TILES, stride, window, rows) if 1 <= t <= 128 and (t <= rows or not rows)})
        keys = [min(box_length(window, stride, causal, t, part > 0), n or sys.maxsize) for t in sizes]
        options.append([(t, k, rows / (-(-rows // t) * t) if rows else 1.0) for t, k in zip(sizes, keys, strict=True)])

    def cost(choice: tuple[tuple[int, int, float], ...]) -> tuple[float, float]:
        tile, box, used = zip(*choice, strict=True)
        rows, keys = prod(tile) * group, prod(box) + extra
        slabs, excess = _fit(rows, box, extra, head_dim, most)
        return excess, _cost(rows, keys, head_dim, slabs) / (prod(tile) * prod(used))

    choices = (choice for choice in product(*options) if prod([t for t, _, _ in choice]) <= MAX_QUERIES)
    tile, box, _ = zip(*min(choices, key=cost), strict=True)
    return Cut(tile, box, _fit(prod(tile) * group, box, extra, head_dim, most)[0])


def positions(axis: Axis) -> int:
    """Positions in the longest dilation group."""
    return ceil_div(axis.length, axis.dilation)


def query_positions(axis: Axis) -> int:
    """Positions of queries in the dilation group that has most of them."""
    return ceil_div(query_count(axis), axis.dilation)


def _axis_tiles(axis: Axis, tile: int, box: int, device: torch.device) -> AxisTiles:
    length, window, stride, dilation, causal, _ = axis
    first, last = query_range(axis)
    count = ceil_div(query_positions(axis), tile)  # tiles of each dilation group
    row = torch.arange(count * dilation, device=device)[:, None]
    group = row // count  # [tiles, 1]
    begin, end = group_length(first, dilation, group), group_length(last, dilation, group)
    p = begin + modulo(row, count) * tile + torch.arange(tile, device=device)
    valid = p < end
    if axis.queries is not None:  # a group without queries repeats one of another group
        group = torch.where(begin < end, group, first % dilation)
        end = group_length(last, dilation, group)
    n, p = group_length(length, dilation, group), torch.minimum(p, end - 1)
    lo, hi = window_bounds(p, n, window, stride, causal)
    start = torch.minimum(lo[:, :1], n - box).clamp(min=0)
    key = start + torch.arange(box, device=device)
    key = (key * dilation + group).clamp(max=length - 1)  # a box longer than its group ends in keys that nobody sees
    return AxisTiles(p * dilation + group - first, key, lo - start, hi - start, start - p + window - 1, valid)


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
        rows.append(modulo(tiles, n))
        tiles = tiles // n
    return rows[::-1]


def _tokens(coordinates: list[Tensor], lengths: list[int]) -> Tensor:
    """Flat tokens `[n, …]` of coordinates `[n, c]` on axes of these lengths, in C order."""
    parts, stride = [], 1
    for coordinate, length in zip(reversed(coordinates), reversed(lengths), strict=True):
        parts.append(coordinate * stride)
        stride = stride * length
    return _outer(torch.add, parts[::-1])


def query_tokens(plan: Plan, rows: list[Tensor]) -> Tensor:
    """Flat tokens of the queries of tiles: int64 `[n, q]`."""
    coordinates = [table.query.index_select(0, row) for table, row in zip(plan.tables, rows, strict=True)]
    return _tokens(coordinates, [query_count(axis) for axis in plan.axes])


def key_tokens(plan: Plan, rows: list[Tensor], slots: tuple[tuple[int, int], ...]) -> Tensor:
    """Flat tokens of the keys of a slab of each box: int64 `[n, k]`."""
    coordinates = [
        table.key[:, first:last].index_select(0, row)
        for table, row, (first, last) in zip(plan.tables, rows, slots, strict=True)
    ]
    return _tokens(coordinates, [axis.length for axis in plan.axes])


def places(plan: Plan, sizes: Sizes, device: torch.device) -> Tensor:
    """Index of each query among those of all tiles `[B * tiles, heads, q]`: int64 `[B, *spatial, heads]`."""
    heads = sizes.key_heads * sizes.group
    parts, tiles, slots = [], heads * plan.queries, 1
    for axis, tile, count in zip(*map(reversed, (plan.axes, plan.tile, plan.grid)), strict=True):
        coordinate = torch.arange(*query_range(axis), device=device)
        group = modulo(coordinate, axis.dilation)
        position = coordinate // axis.dilation - group_length(query_range(axis)[0], axis.dilation, group)
        row = group * (count // axis.dilation) + position // tile
        parts.append(row * tiles + position % tile * slots)
        tiles, slots = tiles * count, slots * tile
    entry = torch.arange(sizes.batch, device=device) * tiles
    parts = [torch.arange(heads, device=device) * plan.queries, *parts, entry]
    shaped = (part[(slice(None), *[None] * i)] for i, part in enumerate(parts))
    return reduce(torch.add, shaped)


def valid(plan: Plan, rows: list[Tensor]) -> Tensor:
    """True for real queries, False for padding of their tile: bool `[n, q]`."""
    return _outer(torch.logical_and, [t.valid.index_select(0, r) for t, r in zip(plan.tables, rows, strict=True)])


def visibility(plan: Plan, rows: list[Tensor], slots: tuple[tuple[int, int], ...], extra: int) -> Tensor:
    """Mask of the keys of a slab that queries see: bool `[n, q, k]`."""
    parts = []
    for table, row, slot_range in zip(plan.tables, rows, slots, strict=True):
        slot = torch.arange(*slot_range, device=row.device)
        first, last = (x.index_select(0, row)[..., None] for x in (table.first, table.last))
        parts.append((slot >= first) & (slot < last))
    return pad(_outer(torch.logical_and, parts), (0, extra), value=True)


def mask_bits(visible: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(keep, fill) with `bits & keep | fill` the bits of a logit where visible, else those of minus infinity.

    Unlike an addition it overrides NaN, and on CPU it is many times faster than `torch.where`.
    """
    keep = visible.to(BITS[dtype]).neg_()
    return keep, ~keep & MINUS_INFINITY[dtype]


def bias_entries(plan: Plan, rows: list[Tensor], slots: tuple[tuple[int, int], ...]) -> Tensor:
    """Entry of the flattened bias table for each query and key of a slab, extra keys aside: int64 `[n, q, k]`."""
    parts, stride = [], 1
    for axis, table, row, slot_range in zip(*map(reversed, (plan.axes, plan.tables, rows, slots)), strict=True):
        entry = table.offset.index_select(0, row)[..., None] + torch.arange(*slot_range, device=row.device)
        parts.append(entry.clamp(0, 2 * axis.window - 2) * stride)
        stride *= 2 * axis.window - 1
    return _outer(torch.add, parts[::-1])


def slab_slots(plan: Plan) -> list[tuple[tuple[int, int], ...]]:
    """Slots of every slab, per axis."""
    whole = [(0, k) for k in plan.box]
    longest = plan.box.index(max(plan.box))
    ends = [plan.box[longest] * i // plan.slabs for i in range(plan.slabs + 1)]
    return [(*whole[:longest], ends_of, *whole[longest + 1 :]) for ends_of in pairwise(ends)]


def make_plan(axes: tuple[Axis, ...], cut: Cut, extra: int, device: torch.device) -> Plan:
    """Cut the grid into tiles; lengths may be symbolic, a box may be longer than its axis."""
    tables = tuple(_axis_tiles(a, t, k, device) for a, t, k in zip(axes, cut.tile, cut.box, strict=True))
    grid = tuple(ceil_div(query_positions(a), t) * a.dilation for a, t in zip(axes, cut.tile, strict=True))
    # Each query sees `window` keys: where no box has more, its queries share one window.
    uniform = all(k == a.window and not a.causal for a, k in zip(axes, cut.box, strict=True))
    return Plan(axes, tables, grid, *cut, extra, uniform, None)


@lru_cache(maxsize=64)
def cached_plan(axes: tuple[Axis, ...], cut: Cut, extra: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """`make_plan`, with classes where their masks are small, for logits of `dtype`."""
    plan = make_plan(axes, cut, extra, torch.device("cpu"))
    tiles = torch.arange(plan.tiles, device="cpu")
    rows = tile_rows(plan, tiles)
    pattern, patterns = torch.zeros_like(tiles), 1
    for table, row in zip(plan.tables, rows, strict=True):
        unique, kind = torch.unique(torch.cat([table.first, table.last, table.offset], 1), dim=0, return_inverse=True)
        pattern, patterns = pattern * len(unique) + kind[row], patterns * len(unique)
    kinds, of_tile = torch.unique(pattern, return_inverse=True)
    if cut.slabs == 1 and len(kinds) * plan.queries * plan.keys <= CLASS_ELEMENTS:
        rows, (slots,) = tile_rows(plan, torch.empty_like(kinds).scatter_(0, of_tile, tiles)), slab_slots(plan)
        masks = mask_bits(visibility(plan, rows, slots, extra), dtype)
        plan = plan._replace(classes=Classes(of_tile, *masks, bias_entries(plan, rows, slots)))
    return tree_map_only(Tensor, lambda x: x.to(device), plan)


def _chunk(plan: Plan, sizes: Sizes, splits: tuple[int, int], i: int, device: torch.device) -> list[Chunk]:
    """The i-th part of the tiles of all the batch, as one chunk for each part of the key heads."""
    queries, keys = prod([query_count(axis) for axis in plan.axes]), prod([axis.length for axis in plan.axes])
    total = sizes.batch * plan.tiles
    tiles = torch.arange(total * i // splits[0], total * (i + 1) // splits[0], device=device)
    batch, tile = tiles // plan.tiles, modulo(tiles, plan.tiles)
    rows = tile_rows(plan, tile)
    query = query_tokens(plan, rows) + batch[:, None] * queries
    slabs = [(slots, 0, key_tokens(plan, rows, slots) + batch[:, None] * keys) for slots in slab_slots(plan)]
    if plan.extra:
        extra = sizes.batch * keys + batch[:, None] * plan.extra + torch.arange(plan.extra, device=device)
        slots, _, key = slabs[-1]
        slabs[-1] = (slots, plan.extra, torch.cat([key, extra], 1))
    kind = None if plan.classes is None else plan.classes.of_tile.index_select(0, tile)
    chunks = []
    for j in range(splits[1]):
        first, last = (sizes.key_heads * x // splits[1] for x in (j, j + 1))
        head = torch.arange(first, last, device=device)
        member = head[:, None] * sizes.group + torch.arange(sizes.group, device=device)  # [h, g]
        query_rows = query[:, None, None, :] * (sizes.key_heads * sizes.group) + member[..., None]  # [n, h, g, q]
        of_head = [
            Slab(slots, extra, (key[:, None, :] * sizes.key_heads + head[:, None]).flatten())  # [n, h, k]
            for slots, extra, key in slabs
        ]
        heads = slice(first * sizes.group, last * sizes.group)
        shape = (tile.shape[0], last - first, sizes.group, plan.queries)
        chunks.append(Chunk(rows, kind, heads, query_rows.flatten(), of_head, shape))
    return chunks


@lru_cache(maxsize=64)
def _cached_chunks(plan_of: tuple, sizes: Sizes, splits: tuple[int, int], device: torch.device) -> list[list[Chunk]]:
    plan = cached_plan(*plan_of, device)
    return [_chunk(plan, sizes, splits, i, device) for i in range(splits[0])]


def chunks(
    plan: Plan, sizes: Sizes, splits: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Iterable[list[Chunk]]:
    """All tiles of the batch in order, in chunks; each a list over key heads."""
    if not tracing():  # where the number of rows may be a symbol
        rows = sizes.batch * plan.tiles * sizes.key_heads * (plan.keys + plan.queries * sizes.group)
        if rows <= CACHED_ROWS:
            cut = Cut(plan.tile, plan.box, plan.slabs)
            return _cached_chunks((plan.axes, cut, plan.extra, dtype), sizes, splits, device)
    return (_chunk(plan, sizes, splits, i, device) for i in range(splits[0]))
