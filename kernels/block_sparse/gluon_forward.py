"""Forward kernel of block-sparse attention for Hopper, in Gluon.

A producer and two consumers share the work of a program by the steps of `common/triton/gluon.py`. A program owns 128
queries of a block, and a tile of keys is a block or a part of one, as in the loop over whole blocks of `forward.py`.
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
from ..neighborhood.tile import coordinates, shift
from .tile import box_count, list_of, part_origin, view

__all__ = ["CONSUMERS", "ROWS", "forward_kernel"]


@gluon.jit
def visible_logits(s, first, steps, lengths, EVEN: gl.constexpr):
    """Logits of a tile that begins at `first`, -inf past the end of the grid, which no tile reaches if `EVEN`."""
    if EVEN:
        return s
    else:
        return gl.where(inside(shift(first, steps), lengths)[None, :], s, float("-inf"))


@gluon.jit
def origin_of(t, idx_ptr, lengths, KEY_BOX: gl.constexpr, TILE: gl.constexpr):
    """First token of tile `t` of a list of blocks."""
    PARTS: gl.constexpr = (KEY_BOX[0] * KEY_BOX[1] * KEY_BOX[2]) // (TILE[0] * TILE[1] * TILE[2])
    return part_origin(gl.load(idx_ptr + t // PARTS), t % PARTS, lengths, KEY_BOX, TILE)


@gluon.jit
def store_nothing(out, lse, box, place, lengths, D: gl.constexpr, QUERY_BOX: gl.constexpr, SHARE: gl.constexpr):
    """Output 0 and log-sum-exp -inf of the queries of a program whose list is empty."""
    BLOCKED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    for HALF in gl.static_range(CONSUMERS):
        first = part_origin(box, CONSUMERS * place + HALF, lengths, QUERY_BOX, SHARE)
        row = shift(first, coordinates(output_rows(D), SHARE))
        store_output(out[0], out[1], gl.zeros([ROWS, D], gl.float32, BLOCKED), row, lengths, D)
        nothing = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, BLOCKED))
        gl.store(lse[0] + offset(row, lse[1]), nothing, mask=inside(row, lengths))


@gluon.jit
def producer(
    q_view, k_view, v_view, places, idx_ptr, total, tiles, bars,
    D: gl.constexpr, QUERY_BOX: gl.constexpr, SHARE: gl.constexpr, KEY_BOX: gl.constexpr, TILE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the queries, then all tiles of the list."""
    box, place, q_lengths, k_lengths = places
    q_desc = describe(q_view[0], q_view[1], q_lengths, D, SHARE)
    first = part_origin(box, CONSUMERS * place, q_lengths, QUERY_BOX, SHARE)
    second = part_origin(box, CONSUMERS * place + 1, q_lengths, QUERY_BOX, SHARE)
    copy_queries(q_desc, first, second, tiles, bars, D)
    k_desc = describe(k_view[0], k_view[1], k_lengths, D, TILE)
    v_desc = describe(v_view[0], v_view[1], k_lengths, D, TILE)
    for t in range(0, total):
        origin = origin_of(t, idx_ptr, k_lengths, KEY_BOX, TILE)
        copy_tile(k_desc, v_desc, origin, t, tiles, bars, D, TILE, STAGES)


@gluon.jit
def consumer(
    out, lse, places, idx_ptr, total, tiles, bars, turns, factor,
    HALF: gl.constexpr, D: gl.constexpr, QUERY_BOX: gl.constexpr, SHARE: gl.constexpr, KEY_BOX: gl.constexpr,
    TILE: gl.constexpr, EVEN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attend `ROWS` queries to the tiles of the list, at least one, and store their output and log-sum-exp."""
    box, place, q_lengths, k_lengths = places
    COLUMNS: gl.constexpr = TILE[0] * TILE[1] * TILE[2]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )
    steps = coordinates(gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LOGITS)), TILE)

    s = first_logits(tiles, bars, HALF, D, COLUMNS)
    if not EVEN:
        s = visible_logits(s, origin_of(0, idx_ptr, k_lengths, KEY_BOX, TILE), steps, k_lengths, EVEN)
    weights, acc, m, l = first_weights(s, factor, total, out[0], bars, D, COLUMNS, STAGES)

    # the logits of every further tile, beside the values of the tile before
    for t in range(1, total):
        s, acc_pending = begin_tile(t, weights, acc, tiles, bars, turns, HALF, D, COLUMNS, STAGES)
        if not EVEN:
            s = visible_logits(s, origin_of(t, idx_ptr, k_lengths, KEY_BOX, TILE), steps, k_lengths, EVEN)
        weights, acc, m, l = end_tile(t, total, s, weights, acc_pending, m, l, factor, bars, D, STAGES)
    acc = last_values(total - 1, weights, acc, tiles, bars, D, COLUMNS, STAGES)

    first = part_origin(box, CONSUMERS * place + HALF, q_lengths, QUERY_BOX, SHARE)
    row = shift(first, coordinates(gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOGITS)), SHARE))
    gl.store(lse[0] + offset(row, lse[1]), (m + gl.log2(l)) * LN2, mask=inside(row, q_lengths))
    row = shift(first, coordinates(output_rows(D), SHARE))
    store_output(out[0], out[1], divided(acc, l, D), row, q_lengths, D)


@gluon.jit(do_not_specialize=["most"])
def forward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, out_ptr, out_strides, lse_ptr, lse_strides,
    num_ptr, idx_ptr, lists, most, q_lengths, k_lengths, heads, scale,
    GROUP: gl.constexpr, D: gl.constexpr, QUERY_BOX: gl.constexpr, SHARE: gl.constexpr, KEY_BOX: gl.constexpr,
    TILE: gl.constexpr, EVEN: gl.constexpr, WIDE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Arguments as the kernel of `forward.py` has them; every stride of features is 1. `SHARE` is the part of a block
    of queries that a consumer owns."""
    PLACES: gl.constexpr = (QUERY_BOX[0] * QUERY_BOX[1] * QUERY_BOX[2]) // (CONSUMERS * ROWS)
    PARTS: gl.constexpr = (KEY_BOX[0] * KEY_BOX[1] * KEY_BOX[2]) // (TILE[0] * TILE[1] * TILE[2])
    pid = gl.program_id(0)
    boxes = box_count(q_lengths, QUERY_BOX)
    place, box, rest = pid % PLACES, pid // PLACES % boxes, pid // PLACES // boxes
    batch, head = rest // heads, rest % heads
    entry = list_of(batch, head, boxes, lists) + box
    total = gl.load(num_ptr + entry) * PARTS
    out, lse = view(out_ptr, out_strides, batch, head, WIDE), view(lse_ptr, lse_strides, batch, head, WIDE)
    if total == 0:
        store_nothing(out, lse, box, place, q_lengths, D, QUERY_BOX, SHARE)
        return
    q_view = view(q_ptr, q_strides, batch, head, WIDE)
    k_view = view(k_ptr, k_strides, batch, head // GROUP, WIDE)
    v_view = view(v_ptr, v_strides, batch, head // GROUP, WIDE)
    idx_ptr += entry * most
    tiles, bars, turns = make_rings(q_ptr, SHARE, TILE, D, STAGES)
    places, factor = (box, place, q_lengths, k_lengths), scale * LOG2E
    gl.warp_specialize(
        [
            (consumer, (out, lse, places, idx_ptr, total, tiles, bars, turns, factor, 0,
                        D, QUERY_BOX, SHARE, KEY_BOX, TILE, EVEN, STAGES)),
            (consumer, (out, lse, places, idx_ptr, total, tiles, bars, turns, factor, 1,
                        D, QUERY_BOX, SHARE, KEY_BOX, TILE, EVEN, STAGES)),
            (producer, (q_view, k_view, v_view, places, idx_ptr, total, tiles, bars,
                        D, QUERY_BOX, SHARE, KEY_BOX, TILE, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
