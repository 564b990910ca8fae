"""Keys that a query sees, and their slots in its window: the one place that knows how a grid is cut.

Every axis is independent; a key is visible when it is visible on all axes. On one axis of `length` L, the coordinate i
is rolled to r = (i - shift) mod L and lies in window r // w at slot r % w (arXiv:2103.14030, section 3.2). Coordinates
that the roll carried round the end, i < shift, and the others do not see one another. With a halo (arXiv:2103.12731)
there is no roll, and window j sees the coordinates j * w - halo to j * w + w + halo - 1 as slots 0 to w + 2 * halo - 1.

In the order of the grid a window is one or two stretches of consecutive coordinates that see only themselves: `runs`
lists them, so that nothing need be rolled, padded or masked.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.calling import PerAxis, per_axis
from ..common.symbolic import known, modulo


class Axis(NamedTuple):
    """One spatial axis cut into windows.

    Attributes:
        length: number of queries, >= 1.
        window: queries per window, 1 <= window <= length; the last window may be partial.
        shift: how far the cuts are moved, 0 <= shift < window.
        halo: keys beyond each side of a window, >= 0; 0 with a shift.
        padded: whether keys begin at coordinate -halo and end at length + halo - 1, instead of where queries do.
    """

    length: int
    window: int
    shift: int = 0
    halo: int = 0
    padded: bool = False

    @property
    def windows(self) -> int:
        """Windows along the axis."""
        return (self.length + self.window - 1) // self.window

    @property
    def span(self) -> int:
        """Key slots of a window."""
        return self.window + 2 * self.halo

    @property
    def margin(self) -> int:
        """Coordinates of keys before the first query."""
        return self.halo if self.padded else 0


def make_axes(
    shape: Sequence[int],
    *,
    window: PerAxis[int],
    shift: PerAxis[int] = 0,
    halo: PerAxis[int] = 0,
    key_shape: Sequence[int] | None = None,
) -> tuple[Axis, ...]:
    """Validated axes of a grid.

    Args:
        shape: queries along each spatial axis.
        window, shift, halo: one value, or one per axis; see `window_attention`.
        key_shape: keys along each spatial axis: as many as queries, or 2 * halo more on every axis; `shape` when None.

    Raises:
        ValueError: a value outside its range; the message names it, the axis and what is accepted.
        TypeError: a value that is no integer.
    """
    rank = len(shape)
    windows, shifts, halos = (
        per_axis(name, value, rank, int) for name, value in (("window", window), ("shift", shift), ("halo", halo))
    )
    for i, (n, w, s, h) in enumerate(zip(shape, windows, shifts, halos, strict=True)):
        if known(w < 1) or known(w > n):
            raise ValueError(f"window={w} on axis {i} must lie in [1, length={n}]")
        if not 0 <= s < w:
            raise ValueError(f"shift={s} on axis {i} must lie in [0, window={w})")
        if h < 0:
            raise ValueError(f"halo={h} on axis {i} must not be negative")
    if any(halos) and any(shifts):
        raise ValueError(f"shift={shifts} cannot be combined with halo={halos}: one of them must be 0")
    enlarged = tuple(n + 2 * h for n, h in zip(shape, halos, strict=True))
    keys = tuple(shape if key_shape is None else key_shape)
    padded = any(halos) and keys == enlarged
    if not padded and keys != tuple(shape):
        wider = f", or larger by halo={halos} on every side, {enlarged}" if any(halos) else ""
        raise ValueError(f"key has a grid of {keys}; expected that of query, {tuple(shape)}{wider}")
    return tuple(Axis(*values, padded) for values in zip(shape, windows, shifts, halos, strict=True))


class Run(NamedTuple):
    """Consecutive stretches of one shape, each `window` coordinates after the one before.

    Attributes:
        count: how many.
        query, queries, slot: index of the first query of the first stretch, their number, the slot of the first.
        key, keys, key_slot: the same of the keys they see, indices counting from the first key.
    """

    count: int
    query: int
    queries: int
    slot: int
    key: int
    keys: int
    key_slot: int


def runs(axis: Axis) -> tuple[Run, ...]:
    """All stretches of an axis in the order of the grid; every query is in one of them."""
    return _halo_runs(axis) if axis.halo else _shift_runs(axis)


def _shift_runs(axis: Axis) -> tuple[Run, ...]:
    length, window, shift = axis.length, axis.window, axis.shift
    stretches = []
    if shift:  # what the roll carries round the end, where a cut may go through it
        slot = (length - shift) % window
        first = min(shift, window - slot)
        stretches.append((1, 0, first, slot))
        if first < shift:
            stretches.append((1, first, shift - first, 0))
    full, rest = (length - shift) // window, (length - shift) % window
    if full:
        stretches.append((full, shift, window, 0))
    if rest:
        stretches.append((1, length - rest, rest, 0))
    return tuple(Run(count, start, size, slot, start, size, slot) for count, start, size, slot in stretches)


def _halo_runs(axis: Axis) -> tuple[Run, ...]:
    length, window, halo, margin = axis.length, axis.window, axis.halo, axis.margin
    first = min(0 if axis.padded else (halo + window - 1) // window, axis.windows)  # the first that lacks no key
    end = max(min((length + margin - halo) // window, length // window), first)

    def run(count: int, j: int) -> Run:
        query = j * window
        lo, hi = max(query - halo, -margin), min(query + window + halo, length + margin)
        return Run(count, query, min(window, length - query), 0, lo + margin, hi - lo, lo - query + halo)

    before = [run(1, j) for j in range(first)]
    after = [run(1, end + j) for j in range(axis.windows - end)]
    return (*before, *([run(end - first, first)] if end > first else ()), *after)


def axis_places(axis: Axis, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Window, slot and whether the roll carried it round, of every query coordinate: three `[length]` vectors."""
    i = torch.arange(axis.length, device=device)
    rolled = modulo(i - axis.shift, axis.length)
    return rolled // axis.window, modulo(rolled, axis.window), i < axis.shift


def axis_key_slots(axis: Axis, device: torch.device | None = None) -> Tensor:
    """Slot of every key in the window of every query, int64 `[length, keys]`; -1 where the query does not see it."""
    window, slot, wrapped = axis_places(axis, device)
    if not axis.halo:
        sees = (window[:, None] == window) & (wrapped[:, None] == wrapped)
        return slot.expand(axis.length, -1).masked_fill(~sees, -1)
    key = torch.arange(axis.length + 2 * axis.margin, device=device) - axis.margin
    key_slot = key - window[:, None] * axis.window + axis.halo
    return key_slot.masked_fill((key_slot < 0) | (key_slot >= axis.span), -1)


def mask(axes: tuple[Axis, ...], device: torch.device | None = None) -> Tensor:
    """Visibility of every key for every query of the flattened grids: bool `[queries, keys]`, C order."""
    full = torch.ones(1, 1, dtype=torch.bool, device=device)
    for axis in axes:
        full = torch.kron(full.to(torch.uint8), (axis_key_slots(axis, device) >= 0).to(torch.uint8)).bool()
    return full


def bias_index(axes: tuple[Axis, ...], device: torch.device | None = None) -> Tensor:
    """Entry of the flattened `[window tokens, key tokens]` bias for every pair: int64 `[queries, keys]`, C order.

    Pairs that do not see each other hold an entry that means nothing.
    """
    query = torch.zeros(1, 1, dtype=torch.int64, device=device)
    key = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for axis in axes:
        slot, key_slot = axis_places(axis, device)[1][:, None], axis_key_slots(axis, device).clamp(min=0)
        size = query.shape[0] * slot.shape[0], key.shape[1] * key_slot.shape[1]
        query = (query[:, None] * axis.window + slot).reshape(size[0], 1)
        key = (key[:, None, :, None] * axis.span + key_slot[None, :, None, :]).reshape(size)
    return query * prod([axis.span for axis in axes]) + key


@lru_cache(maxsize=4096)
def axis_pairs(axis: Axis) -> int:
    """Number of (query, key) pairs of one axis."""
    return sum(run.count * run.queries * run.keys for run in runs(axis))


def visible_pairs(axes: tuple[Axis, ...]) -> int:
    """Number of (query, key) pairs of the whole grid."""
    return prod([axis_pairs(axis) for axis in axes])
