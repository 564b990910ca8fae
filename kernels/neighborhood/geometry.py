"""The window rule of generalized neighborhood attention: visible keys per query, and visible queries per key.

Axes are independent: a key is visible when it is visible on each axis. On an axis of `length` L with dilation d,
coordinate i is position p = i // d of dilation group g = i % d, and each group is a dense problem of its own with
n = ceil((L - g) / d) positions. Rules: arXiv:2504.16922 (window, stride, causal) and arXiv:2209.15001 (dilation).

`window_bounds` and `inverse_bounds` use `+ - * // <` only, so one definition serves Python integers, torch tensors
and, through `triton.jit`, the kernels.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.calling import PerAxis, per_axis


class Axis(NamedTuple):
    """One spatial axis of neighborhood attention.

    Attributes:
        length: number of tokens, >= 1.
        window: keys per query, 1 <= window and window * dilation <= length.
        stride: consecutive queries that share a window, 1 <= stride <= window.
        dilation: distance between neighbouring keys of a window, >= 1.
        causal: whether keys after the query are masked.
        queries: coordinates [first, last) of the queries if they are a subset of the axis; None for the whole axis.
    """

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False
    queries: tuple[int, int] | None = None


def make_axes(
    shape: Sequence[int],
    *,
    window: PerAxis[int],
    stride: PerAxis[int] = 1,
    dilation: PerAxis[int] = 1,
    causal: PerAxis[bool] = False,
) -> tuple[Axis, ...]:
    """Validated axes of a grid.

    Args:
        shape: tokens along each spatial axis.
        window, stride, dilation, causal: one value, or one per axis; see `na2d`.

    Raises:
        ValueError: a value outside its range; the message names it, the axis and what is accepted.
        TypeError: a value that is no integer (or, for `causal`, no boolean).
    """
    rank = len(shape)
    axes = tuple(
        Axis(*values)
        for values in zip(
            shape,
            per_axis("window", window, rank, int),
            per_axis("stride", stride, rank, int),
            per_axis("dilation", dilation, rank, int),
            per_axis("causal", causal, rank, bool),
            strict=True,
        )
    )
    for i, axis in enumerate(axes):
        if axis.window < 1:
            raise ValueError(f"window={axis.window} on axis {i} must be at least 1")
        if axis.window > axis.length:
            raise ValueError(f"window={axis.window} on axis {i} must not exceed its length {axis.length}")
        if not 1 <= axis.stride <= axis.window:
            raise ValueError(f"stride={axis.stride} on axis {i} must lie in [1, window={axis.window}]")
        if axis.dilation < 1:
            raise ValueError(f"dilation={axis.dilation} on axis {i} must be at least 1")
        if axis.window * axis.dilation > axis.length:
            raise ValueError(
                f"dilation={axis.dilation} times window={axis.window} on axis {i} must not exceed its "
                f"length {axis.length}"
            )
    return axes


def window_bounds(p, n, window, stride, causal):
    """Half-open range [lo, hi) of key positions visible to query position `p` of a group of `n` positions.

    Not causal: the window is centred on the leader of p's stride group and shifted inward at borders, so it always has
    `window` keys. Causal: the window ends at p and begins `window` keys before the end of the stride group. Both bounds
    are monotone in p, so the union over consecutive queries is [lo(first), hi(last)).
    """
    if causal:
        leader = p // stride * stride + stride - 1
        leader = leader + (n - 1 - leader) * (leader > n - 1)
        lo = leader - window + 1
        lo = lo * (lo > 0)
        hi = p + 1
    else:
        leader = p // stride * stride + stride // 2
        leader = leader + (n - 1 - leader) * (leader > n - 1)
        lo = leader - window // 2
        lo = lo * (lo > 0)
        lo = lo + (n - window - lo) * (lo > n - window)
        hi = lo + window
    return lo, hi


def inverse_bounds(k, n, window, stride, causal):
    """Half-open range [lo, hi) of query positions to which key position `k` is visible: the inverse of `window_bounds`.

    Both bounds are monotone in k and the range is never empty. All keys of [a, b] are visible exactly to the queries in
    [lo(b), hi(a)).
    """
    if causal:
        lo = k
        hi = ((k + window) // stride + (k + window >= n)) * stride
    else:
        right = (window - 1) // 2  # keys right of the leader
        ahead = stride - stride // 2 - 1  # members of a stride group after its leader
        lo = (k - right + ahead) * (k >= window) // stride * stride
        hi = (k + window // 2 + ahead + 1) // stride * stride
        hi = hi + (n - hi) * (k >= n - window)
    hi = hi + (n - hi) * (hi > n)
    return lo, hi


def group_length(length, dilation, group):
    """Positions in dilation group `group`; groups below length % dilation are one longer than the others."""
    return (length - group + dilation - 1) // dilation


def query_range(axis: Axis) -> tuple[int, int]:
    """Coordinates [first, last) of the queries."""
    return (0, axis.length) if axis.queries is None else axis.queries


def query_count(axis: Axis) -> int:
    """Number of queries."""
    first, last = query_range(axis)
    return last - first


def axis_bounds(axis: Axis, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """First and last visible key coordinate per query, both int64 `[queries]` and inclusive."""
    i = torch.arange(*query_range(axis), device=device)
    group, p = i % axis.dilation, i // axis.dilation
    lo, hi = window_bounds(p, group_length(axis.length, axis.dilation, group), axis.window, axis.stride, axis.causal)
    return lo * axis.dilation + group, (hi - 1) * axis.dilation + group


def key_range(axis: Axis) -> tuple[int, int]:
    """Smallest range [first, last) of coordinates that holds every visible key; there is at least one query."""
    first, last = axis.length, 0
    start, stop = query_range(axis)
    for i in {*range(start, min(start + axis.dilation, stop)), *range(max(stop - axis.dilation, start), stop)}:
        group, p = i % axis.dilation, i // axis.dilation
        n = group_length(axis.length, axis.dilation, group)
        lo, hi = window_bounds(p, n, axis.window, axis.stride, axis.causal)
        first, last = min(first, lo * axis.dilation + group), max(last, (hi - 1) * axis.dilation + group + 1)
    return first, last


def crop(axis: Axis) -> tuple[int, Axis]:
    """Crop the axis to the keys that its queries can see.

    The crop begins at a multiple of stride * dilation, so stride and dilation groups stay as they are. It holds each
    visible key, so no window reaches over its ends and none is shifted. For causal axes the crop also ends at a
    multiple of stride * dilation, because the leader of the last stride group can lie beyond the last visible key. A
    dilation group without queries may keep fewer positions than a window has.

    Returns:
        first coordinate of the crop, and the cropped axis, whose coordinates count from there.
    """
    block = axis.stride * axis.dilation
    first, last = key_range(axis)
    first = first // block * block
    if axis.causal:
        last = min(-(-last // block) * block, axis.length)
    start, stop = query_range(axis)
    return first, axis._replace(length=last - first, queries=(start - first, stop - first))


def axis_mask(axis: Axis, device: torch.device | None = None) -> Tensor:
    """Visibility on one axis: bool `[queries, length]`."""
    first, last = axis_bounds(axis, device)
    key = torch.arange(axis.length, device=device)
    same_group = key % axis.dilation == (torch.arange(*query_range(axis), device=device) % axis.dilation)[:, None]
    return same_group & (key >= first[:, None]) & (key <= last[:, None])


def mask(axes: tuple[Axis, ...], device: torch.device | None = None) -> Tensor:
    """Visibility on the flattened grid: bool `[queries, tokens]`, C order."""
    full = torch.ones(1, 1, dtype=torch.bool, device=device)
    for axis in axes:
        full = torch.kron(full.to(torch.uint8), axis_mask(axis, device).to(torch.uint8)).bool()
    return full


def relative_index(axes: tuple[Axis, ...], device: torch.device | None = None) -> Tensor:
    """Index into the flattened bias table per (query, key) pair: int64 `[queries, tokens]`, C order.

    Per axis the index is (key - query) / dilation + window - 1. Masked pairs hold 0.
    """
    index = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for axis in axes:
        key = torch.arange(axis.length, device=device) // axis.dilation
        query = torch.arange(*query_range(axis), device=device) // axis.dilation
        offset = (key[None, :] - query[:, None] + axis.window - 1).clamp(0, 2 * axis.window - 2)
        index = index[:, None, :, None] * (2 * axis.window - 1) + offset[None, :, None, :]
        index = index.flatten(2).flatten(0, 1)
    return index.masked_fill(~mask(axes, device), 0)


def key_counts(axis: Axis) -> Tensor:
    """Number of visible keys per query of one axis: int64 `[queries]`."""
    first, last = axis_bounds(axis)
    return (last - first) // axis.dilation + 1


def group_sizes(axis: Axis) -> tuple[tuple[int, int, int, int], ...]:
    """Distinct dilation groups of an axis.

    Returns:
        per distinct group: its length, begin and end of its query positions, and the number of groups like it.
    """
    ends = (axis.length, *query_range(axis))
    alike = Counter(tuple(group_length(i, axis.dilation, group) for i in ends) for group in range(axis.dilation))
    return tuple((n, begin, end, groups) for (n, begin, end), groups in alike.items())


@lru_cache(maxsize=4096)
def axis_pairs(axis: Axis) -> int:
    """Number of visible (query, key) pairs of one axis. Python integers only, so it works under fake tensors."""
    pairs = 0
    for n, begin, end, groups in group_sizes(axis):
        for p in range(begin, end):
            lo, hi = window_bounds(p, n, axis.window, axis.stride, axis.causal)
            pairs += groups * (hi - lo)
    return pairs


def visible_pairs(axes: tuple[Axis, ...]) -> int:
    """Number of visible (query, key) pairs of the grid."""
    return prod([axis_pairs(axis) for axis in axes])


class TileWalk(NamedTuple):
    """Tiles that a kernel visits on one axis, summed over its dilation groups.

    Attributes:
        rows: row tiles.
        visited: (row tile, column tile) pairs that the kernel visits.
        inner: visited pairs in which each column is visible to each row, so that no mask is needed.
    """

    rows: int
    visited: int
    inner: int


@lru_cache(maxsize=4096)
def tile_walk(axis: Axis, rows: int, columns: int, *, inverse: bool = False, aligned: bool = False) -> TileWalk:
    """Count the tiles of `columns` keys that tiles of `rows` queries visit; with `inverse`, queries that keys visit.

    Columns begin at the first visible one or, with `aligned`, at the multiple of `columns` before it.
    """
    bounds = inverse_bounds if inverse else window_bounds
    total, visited, inner = 0, 0, 0
    for n, begin, end, groups in group_sizes(axis):
        low, high, row, last_row = (begin, end, 0, n) if inverse else (0, n, begin, end)
        for first in range(row, last_row, rows):
            lo_first, hi_first = bounds(first, n, axis.window, axis.stride, axis.causal)
            lo_last, hi_last = bounds(min(first + rows, last_row) - 1, n, axis.window, axis.stride, axis.causal)
            lo_first, lo_last = max(lo_first, low), max(lo_last, low)
            hi_first, hi_last = min(hi_first, high), min(hi_last, high)
            start = lo_first // columns * columns if aligned else lo_first
            total += groups
            visited += groups * max(-(-(hi_last - start) // columns), 0)
            inner += groups * max((hi_first - start) // columns - -(-(lo_last - start) // columns), 0)
    return TileWalk(total, visited, inner)
