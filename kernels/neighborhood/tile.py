"""Triton helpers shared by the neighborhood kernels: one program owns a tile of rows and walks tiles of columns.

Rows are queries and columns keys in the forward and dQ kernels; in the dK/dV kernel rows are keys and columns queries,
and the inverse windows take the place of the windows. Every grid is treated as three-dimensional; a 1-D or 2-D grid has
leading axes of length 1. `TILE`, `WINDOW`, `STRIDE`, `DILATION` and `CAUSAL` are 3-tuples of constants.

With `PART` the queries are a box of the grid, a tensor of their own: they are counted from the first query of their
dilation group on, which lies `begin` positions into the group.
"""

from types import FunctionType

import triton
import triton.language as tl

from ..common.triton.features import load_vectors
from ..common.triton.memory import inside, offset
from . import geometry


def _device(rule):
    """A rule of `geometry` as a device function; Triton's interpreter wants `tl` among the function's globals."""
    return triton.jit(FunctionType(rule.__code__, globals(), rule.__name__))


_window_bounds = _device(geometry.window_bounds)
_inverse_bounds = _device(geometry.inverse_bounds)
_group_length = _device(geometry.group_length)


@triton.jit
def bounds(
    row, n, begin, queries, A: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, INVERSE: tl.constexpr, PART: tl.constexpr,
):
    """Columns [lo, hi) that rows of axis `A` see; rows past the end count as the last one.

    `queries` of the group's `n` positions, from `begin` on, are queries; without `PART` all are.
    """
    if INVERSE:
        lo, hi = _inverse_bounds(tl.minimum(row, n - 1), n, WINDOW[A], STRIDE[A], CAUSAL[A])
        if PART:
            lo, hi = tl.maximum(lo - begin, 0), tl.minimum(hi - begin, queries)
    elif PART:
        lo, hi = _window_bounds(begin + tl.minimum(row, queries - 1), n, WINDOW[A], STRIDE[A], CAUSAL[A])
    else:
        lo, hi = _window_bounds(tl.minimum(row, n - 1), n, WINDOW[A], STRIDE[A], CAUSAL[A])
    return lo, hi


@triton.jit
def row_bounds(
    row, n, begin, queries,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, INVERSE: tl.constexpr, PART: tl.constexpr,
):
    """Columns that rows see, per axis: 3-tuples of the first and of how many."""
    lo_x, hi_x = bounds(row[0], n[0], begin[0], queries[0], 0, WINDOW, STRIDE, CAUSAL, INVERSE, PART)
    lo_y, hi_y = bounds(row[1], n[1], begin[1], queries[1], 1, WINDOW, STRIDE, CAUSAL, INVERSE, PART)
    lo_z, hi_z = bounds(row[2], n[2], begin[2], queries[2], 2, WINDOW, STRIDE, CAUSAL, INVERSE, PART)
    return (lo_x, lo_y, lo_z), (tl.maximum(hi_x - lo_x, 0), tl.maximum(hi_y - lo_y, 0), tl.maximum(hi_z - lo_z, 0))


@triton.jit
def span(
    row, n, begin, queries, A: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, INVERSE: tl.constexpr, PART: tl.constexpr,
):
    """Column tiles that a tile of rows touches on one axis.

    Returns the first column, the number of column tiles from there on, and the range (index, number) of those among
    them in which every row sees every column.
    """
    lo_first, hi_first = bounds(row, n, begin, queries, A, WINDOW, STRIDE, CAUSAL, INVERSE, PART)
    lo_last, hi_last = bounds(row + ROWS[A] - 1, n, begin, queries, A, WINDOW, STRIDE, CAUSAL, INVERSE, PART)
    count = tl.cdiv(hi_last - lo_first, COLUMNS[A])
    if PART:  # keys that no query of the box sees
        count = tl.maximum(count, 0)
    inner = tl.cdiv(lo_last - lo_first, COLUMNS[A])
    inner_count = tl.maximum((hi_first - lo_first) // COLUMNS[A] - inner, 0)
    return lo_first, count, inner, inner_count


@triton.jit
def spans(
    first, n, begin, queries, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, INVERSE: tl.constexpr, PART: tl.constexpr,
):
    """`span` of all axes: 3-tuples of first columns, tile counts, first inner tiles and inner tile counts."""
    start_x, count_x, inner_x, inner_nx = span(
        first[0], n[0], begin[0], queries[0], 0, ROWS, COLUMNS, WINDOW, STRIDE, CAUSAL, INVERSE, PART
    )
    start_y, count_y, inner_y, inner_ny = span(
        first[1], n[1], begin[1], queries[1], 1, ROWS, COLUMNS, WINDOW, STRIDE, CAUSAL, INVERSE, PART
    )
    start_z, count_z, inner_z, inner_nz = span(
        first[2], n[2], begin[2], queries[2], 2, ROWS, COLUMNS, WINDOW, STRIDE, CAUSAL, INVERSE, PART
    )
    starts, counts = (start_x, start_y, start_z), (count_x, count_y, count_z)
    return starts, counts, (inner_x, inner_y, inner_z), (inner_nx, inner_ny, inner_nz)


@triton.jit
def integers(odd):
    """The integers that `launching.unspecialised` made odd."""
    return (odd[0] + 1) // 2, (odd[1] + 1) // 2, (odd[2] + 1) // 2


@triton.jit
def grids(lengths, start, counts, PART: tl.constexpr):
    """Lengths of the grid, and first coordinates and lengths of the box of queries; without `PART` that is the grid."""
    lengths = integers(lengths)
    if PART:
        return lengths, integers(start), integers(counts)
    else:
        return lengths, (0, 0, 0), lengths


@triton.jit
def row_strides(lengths, heads):
    """Strides of contiguous `[B, X, Y, Z, heads]`: of log-sum-exps, and what goes with them."""
    y, x = lengths[2] * heads, lengths[1] * lengths[2] * heads
    return tl.cast(lengths[0], tl.int64) * x, x, y, heads, 1


@triton.jit
def _turn(i, count, BACKWARD: tl.constexpr):
    return count - 1 - i if BACKWARD else i


@triton.jit
def program(pid, lengths, heads, TILE: tl.constexpr, DILATION: tl.constexpr, BACKWARD: tl.constexpr):
    """Batch, head, origin and lengths of the dilation group, and first row, of program `pid`.

    Tiles vary fastest, so that neighbouring programs share columns in L2; axes of `BACKWARD` are walked from their end.
    A tile past the end of a short group is empty: its first row is not below the group's length.
    """
    tx = tl.cdiv(tl.cdiv(lengths[0], DILATION[0]), TILE[0])
    ty = tl.cdiv(tl.cdiv(lengths[1], DILATION[1]), TILE[1])
    tz = tl.cdiv(tl.cdiv(lengths[2], DILATION[2]), TILE[2])
    z = _turn(pid % tz, tz, BACKWARD[2]) * TILE[2]
    pid = pid // tz
    y = _turn(pid % ty, ty, BACKWARD[1]) * TILE[1]
    pid = pid // ty
    x = _turn(pid % tx, tx, BACKWARD[0]) * TILE[0]
    pid = pid // tx
    gz = pid % DILATION[2]
    pid = pid // DILATION[2]
    gy = pid % DILATION[1]
    pid = pid // DILATION[1]
    gx = pid % DILATION[0]
    pid = pid // DILATION[0]
    nx = _group_length(lengths[0], DILATION[0], gx)
    ny = _group_length(lengths[1], DILATION[1], gy)
    nz = _group_length(lengths[2], DILATION[2], gz)
    return pid // heads, pid % heads, (gx, gy, gz), (nx, ny, nz), (x, y, z)


@triton.jit
def part(group, n, lengths, start, counts, DILATION: tl.constexpr, PART: tl.constexpr):
    """Of a dilation group: its length, the position of its first query, how many queries it has, and where the first
    lies among the queries, which are `counts` tokens from `start` on; without `PART` the whole group of `n`."""
    if PART:
        nx, bx, mx, ox = _axis_part(group[0], lengths[0], start[0], counts[0], DILATION[0])
        ny, by, my, oy = _axis_part(group[1], lengths[1], start[1], counts[1], DILATION[1])
        nz, bz, mz, oz = _axis_part(group[2], lengths[2], start[2], counts[2], DILATION[2])
        return (nx, ny, nz), (bx, by, bz), (mx, my, mz), (ox, oy, oz)
    else:
        return n, (0, 0, 0), n, group


@triton.jit
def _axis_part(group, length, start, count, DILATION: tl.constexpr):
    begin = _group_length(start, DILATION, group)
    end = _group_length(start + count, DILATION, group)
    return _group_length(length, DILATION, group), begin, end - begin, begin * DILATION + group - start


@triton.jit
def coordinates(i, TILE: tl.constexpr):
    """Coordinates of token number `i` of a tile relative to its first, C order."""
    return i // (TILE[1] * TILE[2]), i // TILE[2] % TILE[1], i % TILE[2]


@triton.jit
def local(TILE: tl.constexpr):
    """`coordinates` of all tokens of a tile: three `[tokens]` vectors."""
    return coordinates(tl.arange(0, TILE[0] * TILE[1] * TILE[2]), TILE)


@triton.jit
def tile_count(counts, inner_counts, MASKED: tl.constexpr):
    """Number of column tiles that a row tile visits: those wholly visible, or with `MASKED` the rest."""
    inner = inner_counts[0] * inner_counts[1] * inner_counts[2]
    return counts[0] * counts[1] * counts[2] - inner if MASKED else inner


@triton.jit
def tile_origin(
    t, starts, counts, inner, inner_counts, COLUMNS: tl.constexpr, MASKED: tl.constexpr, INNER: tl.constexpr
):
    """First column of tile number `t` of those that `tile_count` counts; without `INNER` no tile is wholly seen."""
    if not MASKED:
        x, y, z = _box_tile(t, inner, inner_counts)
    elif INNER:
        x, y, z = _border_tile(t, counts, inner, inner_counts)
    else:
        x, y, z = _box_tile(t, (0, 0, 0), counts)
    return starts[0] + x * COLUMNS[0], starts[1] + y * COLUMNS[1], starts[2] + z * COLUMNS[2]


@triton.jit
def _reciprocal(n):
    return 1.0 / tl.cast(tl.maximum(n, 1), tl.float32)


@triton.jit
def _split(t, n, reciprocal):
    """Quotient and remainder of 0 <= t < 2**20 by n >= 1: division in a loop would cost as much as a mask."""
    quotient = tl.cast((tl.cast(t, tl.float32) + 0.5) * reciprocal, tl.int32)
    return quotient, t - quotient * n


@triton.jit
def _box_tile(t, first, counts):
    """Coordinates, in tiles, of tile number `t` of the box of `counts` tiles that begins at `first`."""
    x, t = _split(t, counts[1] * counts[2], _reciprocal(counts[1] * counts[2]))
    y, z = _split(t, counts[2], _reciprocal(counts[2]))
    return first[0] + x, first[1] + y, first[2] + z


@triton.jit
def _skip(j, inner, count):
    return j + tl.where(j >= inner, count, 0)


@triton.jit
def _border_tile(t, counts, inner, inner_counts):
    """Coordinates, in tiles, of tile number `t` among those outside the inner box: first the tiles outside it on x,
    then those inside on x and outside on y, then those inside on x and y and outside on z."""
    plane = counts[1] * counts[2]
    side = (counts[1] - inner_counts[1]) * counts[2]
    outer = counts[2] - inner_counts[2]
    ends = inner_counts[1] * outer
    slabs = (counts[0] - inner_counts[0]) * plane
    sides = slabs + inner_counts[0] * side
    on_x, on_z = t < slabs, t >= sides

    t -= tl.where(on_x, 0, tl.where(on_z, sides, slabs))
    per_x = tl.where(on_x, plane, tl.where(on_z, ends, side))
    per_y = tl.where(on_z, outer, counts[2])
    x, t = _split(t, per_x, tl.where(on_x, _reciprocal(plane), tl.where(on_z, _reciprocal(ends), _reciprocal(side))))
    y, z = _split(t, per_y, tl.where(on_z, _reciprocal(outer), _reciprocal(counts[2])))

    x = tl.where(on_x, _skip(x, inner[0], inner_counts[0]), inner[0] + x)
    y = tl.where(on_x, y, tl.where(on_z, inner[1] + y, _skip(y, inner[1], inner_counts[1])))
    z = tl.where(on_z, _skip(z, inner[2], inner_counts[2]), z)
    return x, y, z


@triton.jit
def below(a, b):
    """Mask of 0 <= a < b, for b >= 0: one comparison."""
    return tl.cast(a, tl.uint32) < tl.cast(b, tl.uint32)


@triton.jit
def visible(column, lo, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Mask `[rows, columns]` of the columns that rows see: `count` columns from `lo` on.

    A row sees no column on an axis where it does not see that of the axis before. So a logit costs one comparison, and
    another every run of columns that differ on the last axis only. An axis of one row and one column needs none.
    """
    seen = count[2][:, None]
    if ROWS[1] * COLUMNS[1] > 1:
        seen_y = count[1][:, None]
        if ROWS[0] * COLUMNS[0] > 1:
            seen_y = tl.where(below(column[0][None, :] - lo[0][:, None], count[0][:, None]), seen_y, 0)
        seen = tl.where(below(column[1][None, :] - lo[1][:, None], seen_y), seen, 0)
    elif ROWS[0] * COLUMNS[0] > 1:
        seen = tl.where(below(column[0][None, :] - lo[0][:, None], count[0][:, None]), seen, 0)
    return below(column[2][None, :] - lo[2][:, None], seen)


@triton.jit
def shift(origin, step):
    """Sum of two positions."""
    return origin[0] + step[0], origin[1] + step[1], origin[2] + step[2]


@triton.jit
def group_view(ptr, strides, batch, head, group, DILATION: tl.constexpr, WIDE: tl.constexpr):
    """Pointer to a dilation group of one batch and head, and the group's spatial strides.

    `strides` are those of `[B, X, Y, Z, heads, head_dim]`. `WIDE` makes offsets inside the group 64 bits.
    """
    sx, sy, sz = strides[1], strides[2], strides[3]
    ptr += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[4]
    ptr += group[0].to(tl.int64) * sx + group[1].to(tl.int64) * sy + group[2].to(tl.int64) * sz
    if WIDE:
        sx, sy, sz = tl.cast(sx, tl.int64), tl.cast(sy, tl.int64), tl.cast(sz, tl.int64)
    return ptr, (sx * DILATION[0], sy * DILATION[1], sz * DILATION[2])


@triton.jit
def describe(ptr, strides, lengths, D: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tensor descriptors of a dilation group, one a part, whose boxes are tiles; reads outside the group give zero."""
    FIRST: tl.constexpr = BLOCK_D[0]
    if len(BLOCK_D) > 1:
        SECOND: tl.constexpr = BLOCK_D[1]
        return (
            _describe_part(ptr, strides, lengths, D, TILE, FIRST),
            _describe_part(ptr, strides, lengths, D, TILE, SECOND),
        )
    else:
        return (_describe_part(ptr, strides, lengths, D, TILE, FIRST),)


@triton.jit
def _describe_part(ptr, strides, lengths, D: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    return tl.make_tensor_descriptor(
        ptr,
        shape=[lengths[0], lengths[1], lengths[2], D],
        strides=[strides[0], strides[1], strides[2], 1],
        block_shape=[TILE[0], TILE[1], TILE[2], WIDTH],
    )


@triton.jit
def _load_box(descriptor, origin, BEGIN: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    box = descriptor.load([origin[0], origin[1], origin[2], BEGIN])
    return box.reshape(TILE[0] * TILE[1] * TILE[2], WIDTH)


@triton.jit
def load_tile(
    ptr, descriptor, origin, steps, strides, stride_d, lengths,
    D: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTOR: tl.constexpr, CHECK: tl.constexpr,
):
    """Vectors of the tile at `origin`, see `features`; zero outside the group and past `D`.

    With `DESCRIPTOR` the hardware addresses the box; otherwise pointers do, checked against the group's end only if
    `CHECK`.
    """
    if DESCRIPTOR:
        FIRST: tl.constexpr = BLOCK_D[0]
        if len(BLOCK_D) > 1:
            SECOND: tl.constexpr = BLOCK_D[1]
            return (
                _load_box(descriptor[0], origin, 0, TILE, FIRST),
                _load_box(descriptor[1], origin, FIRST, TILE, SECOND),
            )
        else:
            return (_load_box(descriptor[0], origin, 0, TILE, FIRST),)
    else:
        rows = offset(origin, strides) + offset(steps, strides)
        keep = inside(shift(origin, steps), lengths)
        return load_vectors(ptr, rows, stride_d, keep, D, BLOCK_D, CHECK)
