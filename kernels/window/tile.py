"""Triton helpers shared by the window kernels: where the tokens of windows stand on the grid.

A tile holds `SIZE` slots of each of `PACK` consecutive windows, as `[PACK * SIZE]` rows. Every grid is treated as
three-dimensional; a 1-D or 2-D grid has leading axes of length 1. `WINDOW`, `SHIFT`, `HALO` and `MARGIN` are 3-tuples
of constants with the meaning of `geometry.Axis`; queries have no halo and no margin.
"""

import triton
import triton.language as tl

NONE = tl.constexpr((0, 0, 0))


@triton.jit
def split(index, sizes):
    """Coordinates of a flat index in a box, C order."""
    return index // (sizes[1] * sizes[2]), index // sizes[2] % sizes[1], index % sizes[2]


@triton.jit
def windows(n, WINDOW: tl.constexpr):
    """Windows along each axis."""
    return tl.cdiv(n[0], WINDOW[0]), tl.cdiv(n[1], WINDOW[1]), tl.cdiv(n[2], WINDOW[2])


@triton.jit
def place_axis(
    window, slot, n, A: tl.constexpr,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, HALO: tl.constexpr, MARGIN: tl.constexpr,
):
    """Index, existence and whether the roll carried it round, of slots of windows on one axis."""
    i = window * WINDOW[A] + slot + (MARGIN[A] - HALO[A])
    keep = (i >= 0) & (i < n[A] + 2 * MARGIN[A])
    wrapped = tl.where(i + SHIFT[A] >= n[A] + 2 * MARGIN[A], 1, 0)
    if SHIFT[A]:
        i += SHIFT[A] - n[A] * wrapped
    return i, keep, wrapped


@triton.jit
def place(
    window, slot, n, WINDOW: tl.constexpr, SHIFT: tl.constexpr, HALO: tl.constexpr, MARGIN: tl.constexpr
):
    """`place_axis` of three axes: 3-tuple of indices, existence, and a number for each region of a shifted window."""
    x, keep_x, wrapped_x = place_axis(window[0], slot[0], n, 0, WINDOW, SHIFT, HALO, MARGIN)
    y, keep_y, wrapped_y = place_axis(window[1], slot[1], n, 1, WINDOW, SHIFT, HALO, MARGIN)
    z, keep_z, wrapped_z = place_axis(window[2], slot[2], n, 2, WINDOW, SHIFT, HALO, MARGIN)
    return (x, y, z), keep_x & keep_y & keep_z, wrapped_x * 4 + wrapped_y * 2 + wrapped_z


@triton.jit
def tile(
    first_window, first_slot, n, PACK: tl.constexpr, SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, HALO: tl.constexpr, MARGIN: tl.constexpr,
):
    """Slot, place, existence and region of the rows of a tile."""
    SPAN: tl.constexpr = (WINDOW[0] + 2 * HALO[0], WINDOW[1] + 2 * HALO[1], WINDOW[2] + 2 * HALO[2])
    i = tl.arange(0, PACK * SIZE)
    window, slot = first_window + i // SIZE, first_slot + i % SIZE
    counts = windows(n, WINDOW)
    position, keep, region = place(split(window, counts), split(slot, SPAN), n, WINDOW, SHIFT, HALO, MARGIN)
    keep &= (slot < SPAN[0] * SPAN[1] * SPAN[2]) & (window < counts[0] * counts[1] * counts[2])
    return slot, position, keep, region


@triton.jit
def sees(
    region, column_region, column_keep,
    PACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHIFT: tl.constexpr,
):
    """Mask of the columns that rows see: those that exist, of the same window and region."""
    see = column_keep[None, :]
    if SHIFT[0] + SHIFT[1] + SHIFT[2] > 0:
        see &= region[:, None] == column_region[None, :]
    if PACK > 1:
        row, column = tl.arange(0, PACK * ROWS) // ROWS, tl.arange(0, PACK * COLUMNS) // COLUMNS
        see &= row[:, None] == column[None, :]
    return see


@triton.jit
def offset(position, strides, WIDE: tl.constexpr):
    """Element offset of positions in a view; `WIDE` makes it 64 bits."""
    sx, sy, sz = strides[1], strides[2], strides[3]
    if WIDE:
        sx, sy, sz = tl.cast(sx, tl.int64), tl.cast(sy, tl.int64), tl.cast(sz, tl.int64)
    return position[0] * sx + position[1] * sy + position[2] * sz


@triton.jit
def load(ptr, strides, position, keep, D, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Tokens of a view as `[rows, BLOCK_D]`, zero where they do not exist and past `D`."""
    d, where = tl.arange(0, BLOCK_D), offset(position, strides, WIDE)
    pointers = ptr + where[:, None] + (d.to(where.dtype) * strides[5])[None, :]
    return tl.load(pointers, mask=keep[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store(ptr, strides, position, keep, x, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Write `[rows, BLOCK_D]` to the tokens of a contiguous view."""
    d = tl.arange(0, BLOCK_D)
    pointers = ptr + offset(position, strides, WIDE)[:, None] + d[None, :]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=keep[:, None] & (d < D)[None, :])


@triton.jit
def bias_pointers(bias_ptr, head, query, key, WINDOW: tl.constexpr, HALO: tl.constexpr):
    """Pointers into a contiguous `[heads, window tokens, key tokens]`; `query` and `key` are slots that broadcast."""
    T: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    S: tl.constexpr = (WINDOW[0] + 2 * HALO[0]) * (WINDOW[1] + 2 * HALO[1]) * (WINDOW[2] + 2 * HALO[2])
    return bias_ptr + tl.cast(head, tl.int64) * (T * S) + query * S + key
