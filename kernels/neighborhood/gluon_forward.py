"""Forward kernel of neighborhood attention for Hopper, in Gluon.

A producer and two consumers share the work of a program by the steps of `common/triton/gluon.py`. The walk, the masks
and the softmax are those of `forward.py`, by the same functions.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..common.triton.gluon import (
    CONSUMERS,
    ROWS,
    begin_tile,
    copy_queries,
    copy_tile,
    describe,
    divided,
    end_tile,
    first_logits,
    first_weights,
    last_values,
    make_rings,
    output_rows,
    store_output,
)
from ..common.triton.memory import inside, offset
from ..common.triton.softmax import LN2, LOG2E
from .tile import (
    coordinates,
    grids,
    group_view,
    part,
    program,
    row_bounds,
    row_strides,
    shift,
    spans,
    tile_count,
    tile_origin,
    visible,
)

__all__ = ["CONSUMERS", "ROWS", "forward_kernel"]


@gluon.jit
def first_origin(
    starts, visits, inner, inner_visits, KEYS: gl.constexpr, INNER: gl.constexpr, BORDER: gl.constexpr
):  # fmt: skip
    """First column of the first tile of the walk: a wholly visible one, if there is any."""
    if not BORDER:
        return tile_origin(0, starts, visits, inner, inner_visits, KEYS, False, INNER)
    elif INNER:
        x, y, z = tile_origin(0, starts, visits, inner, inner_visits, KEYS, True, INNER)
        wholly = tile_count(visits, inner_visits, False) > 0
        ix, iy, iz = tile_origin(0, starts, visits, inner, inner_visits, KEYS, False, INNER)
        return gl.where(wholly, ix, x), gl.where(wholly, iy, y), gl.where(wholly, iz, z)
    else:
        return tile_origin(0, starts, visits, inner, inner_visits, KEYS, True, INNER)


@gluon.jit
def producer(
    q_view, k_view, v_view, places, walk, tiles, bars,
    D: gl.constexpr, QUERIES: gl.constexpr, SHARE: gl.constexpr, KEYS: gl.constexpr,
    INNER: gl.constexpr, BORDER: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the queries, then all tiles of the walk."""
    first, n, _, nq = places
    starts, visits, inner, inner_visits = walk
    q_desc = describe(q_view[0], q_view[1], nq, D, SHARE)
    copy_queries(q_desc, first, shift(first, coordinates(ROWS, QUERIES)), tiles, bars, D)
    k_desc = describe(k_view[0], k_view[1], n, D, KEYS)
    v_desc = describe(v_view[0], v_view[1], n, D, KEYS)
    done = 0
    for MASKED in gl.static_range(1 - INNER, 1 + BORDER):
        count = tile_count(visits, inner_visits, MASKED)
        for i in range(0, count):
            origin = tile_origin(i, starts, visits, inner, inner_visits, KEYS, MASKED, INNER)
            copy_tile(k_desc, v_desc, origin, done + i, tiles, bars, D, KEYS, STAGES)
        done += count


@gluon.jit
def consumer(
    out, lse, places, walk, tiles, bars, turns, factor,
    HALF: gl.constexpr, D: gl.constexpr, QUERIES: gl.constexpr, KEYS: gl.constexpr,
    WINDOW: gl.constexpr, STRIDE: gl.constexpr, CAUSAL: gl.constexpr, PART: gl.constexpr,
    INNER: gl.constexpr, BORDER: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attend `ROWS` queries to all tiles of the walk and store their output and log-sum-exp."""
    first, n, begin, nq = places
    starts, visits, inner, inner_visits = walk
    COLUMNS: gl.constexpr = KEYS[0] * KEYS[1] * KEYS[2]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )
    row = shift(first, coordinates(HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOGITS)), QUERIES))
    steps = coordinates(gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LOGITS)), KEYS)
    lo, count = row_bounds(row, n, begin, nq, WINDOW, STRIDE, CAUSAL, False, PART)
    total = visits[0] * visits[1] * visits[2]

    s = first_logits(tiles, bars, HALF, D, COLUMNS)
    if BORDER:
        corner = first_origin(starts, visits, inner, inner_visits, KEYS, INNER, BORDER)
        s = gl.where(visible(shift(corner, steps), lo, count, QUERIES, KEYS), s, float("-inf"))
    weights, acc, m, l = first_weights(s, factor, total, out[0], bars, D, COLUMNS, STAGES)

    # the logits of every further tile, beside the values of the tile before
    done, begun = 0, 1
    for MASKED in gl.static_range(1 - INNER, 1 + BORDER):
        visited = tile_count(visits, inner_visits, MASKED)
        for i in range(begun, visited):
            s, acc_pending = begin_tile(done + i, weights, acc, tiles, bars, turns, HALF, D, COLUMNS, STAGES)
            if MASKED:
                corner = tile_origin(i, starts, visits, inner, inner_visits, KEYS, MASKED, INNER)
                s = gl.where(visible(shift(corner, steps), lo, count, QUERIES, KEYS), s, float("-inf"))
            weights, acc, m, l = end_tile(done + i, total, s, weights, acc_pending, m, l, factor, bars, D, STAGES)
        done += visited
        begun = gl.maximum(begun - visited, 0)
    acc = last_values(total - 1, weights, acc, tiles, bars, D, COLUMNS, STAGES)

    gl.store(lse[0] + offset(row, lse[1]), (m + gl.log2(l)) * LN2, mask=inside(row, nq))
    row = shift(first, coordinates(HALF * ROWS + output_rows(D), QUERIES))
    store_output(out[0], out[1], divided(acc, l, D), row, nq, D)


@gluon.jit
def forward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, out_ptr, out_strides, lse_ptr,
    lengths, start, counts, heads, scale,
    GROUP: gl.constexpr, D: gl.constexpr, QUERIES: gl.constexpr, SHARE: gl.constexpr, KEYS: gl.constexpr,
    WINDOW: gl.constexpr, STRIDE: gl.constexpr, DILATION: gl.constexpr, CAUSAL: gl.constexpr,
    PART: gl.constexpr, INNER: gl.constexpr, BORDER: gl.constexpr, WIDE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Arguments as the kernel of `forward.py` has them; every stride of features is 1."""
    lengths, start, counts = grids(lengths, start, counts, PART)
    batch, head, group, n, first = program(gl.program_id(0), counts, heads, QUERIES, DILATION, CAUSAL)
    n, begin, nq, origin = part(group, n, lengths, start, counts, DILATION, PART)
    if (first[0] >= nq[0]) | (first[1] >= nq[1]) | (first[2] >= nq[2]):
        return
    q_view = group_view(q_ptr, q_strides, batch, head, origin, DILATION, WIDE)
    k_view = group_view(k_ptr, k_strides, batch, head // GROUP, group, DILATION, WIDE)
    v_view = group_view(v_ptr, v_strides, batch, head // GROUP, group, DILATION, WIDE)
    out = group_view(out_ptr, out_strides, batch, head, origin, DILATION, WIDE)
    lse = group_view(lse_ptr, row_strides(counts, heads), batch, head, origin, DILATION, WIDE)
    walk = spans(first, n, begin, nq, QUERIES, KEYS, WINDOW, STRIDE, CAUSAL, False, PART)
    tiles, bars, turns = make_rings(q_ptr, SHARE, KEYS, D, STAGES)
    places, factor = (first, n, begin, nq), scale * LOG2E
    gl.warp_specialize(
        [
            (consumer, (out, lse, places, walk, tiles, bars, turns, factor, 0,
                        D, QUERIES, KEYS, WINDOW, STRIDE, CAUSAL, PART, INNER, BORDER, STAGES)),
            (consumer, (out, lse, places, walk, tiles, bars, turns, factor, 1,
                        D, QUERIES, KEYS, WINDOW, STRIDE, CAUSAL, PART, INNER, BORDER, STAGES)),
            (producer, (q_view, k_view, v_view, places, walk, tiles, bars,
                        D, QUERIES, SHARE, KEYS, INNER, BORDER, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
