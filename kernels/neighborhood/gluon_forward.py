"""Forward kernel of neighborhood attention for Hopper, in Gluon: warps of a program do different parts of the work.

A producer, one warp, copies the queries and then tiles of keys and values into rings of buffers. Two consumers, four
warps each, own half of the queries each. A consumer begins the logits of a tile together with the product of weights
and values of the tile before, and makes the new weights while the latter runs. The consumers take turns at the matrix
units, so that one multiplies while the other is busy with exponentials (FlashAttention-3, arXiv:2407.08608, section 3).

The walk, the masks and the steps of the softmax are those of `forward.py`, by the same functions. A buffer has two
barriers: `full` once its copy has arrived, `empty` once both consumers have read it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common.triton.memory import inside, offset
from ..common.triton.softmax import LN2, LOG2E, softmax_weights
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

ROWS = gl.constexpr(64)  # queries of a consumer: the rows of a matrix instruction of four warps
CONSUMERS = gl.constexpr(2)


@gluon.jit
def describe(ptr, strides, lengths, D: gl.constexpr, TILE: gl.constexpr):
    """Tensor descriptor of a dilation group whose boxes are tiles; reads outside the group give zero."""
    BOX: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return tma.make_tensor_descriptor(
        ptr,
        [lengths[0], lengths[1], lengths[2], D],
        [strides[0], strides[1], strides[2], 1],
        [TILE[0], TILE[1], TILE[2], D],
        BOX,
    )


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
    """Copy the queries, then all tiles of the walk into the ring: keys, and values behind them."""
    first, n, _, nq = places
    starts, visits, inner, inner_visits = walk
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, k_empty, v_full, v_empty = bars
    BYTES: gl.constexpr = 2 * D * KEYS[0] * KEYS[1] * KEYS[2]
    q_desc = describe(q_view[0], q_view[1], nq, D, SHARE)
    mbarrier.expect(q_full, 2 * D * CONSUMERS * ROWS)
    for HALF in gl.static_range(CONSUMERS):
        x, y, z = shift(first, coordinates(HALF * ROWS, QUERIES))
        tma.async_copy_global_to_shared(q_desc, [x, y, z, 0], q_full, q_tiles.index(HALF))
    k_desc = describe(k_view[0], k_view[1], n, D, KEYS)
    v_desc = describe(v_view[0], v_view[1], n, D, KEYS)
    done = 0
    for MASKED in gl.static_range(1 - INNER, 1 + BORDER):
        count = tile_count(visits, inner_visits, MASKED)
        for i in range(0, count):
            t = done + i
            slot, phase = t % STAGES, t // STAGES & 1
            x, y, z = tile_origin(i, starts, visits, inner, inner_visits, KEYS, MASKED, INNER)
            # a fresh barrier counts as past its phase 1, so the first round finds all buffers empty
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), BYTES)
            tma.async_copy_global_to_shared(k_desc, [x, y, z, 0], k_full.index(slot), k_tiles.index(slot))
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), BYTES)
            tma.async_copy_global_to_shared(v_desc, [x, y, z, 0], v_full.index(slot), v_tiles.index(slot))
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
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, k_empty, v_full, v_empty = bars
    COLUMNS: gl.constexpr = KEYS[0] * KEYS[1] * KEYS[2]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    dtype = out[0].dtype.element_ty

    row = shift(first, coordinates(HALF * ROWS + gl.arange(0, ROWS, layout=ROW), QUERIES))
    steps = coordinates(gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LOGITS)), KEYS)
    lo, count = row_bounds(row, n, begin, nq, WINDOW, STRIDE, CAUSAL, False, PART)

    # the first tile, whose logits nothing overlaps
    zero = gl.zeros([ROWS, COLUMNS], gl.float32, LOGITS)
    acc = gl.zeros([ROWS, D], gl.float32, OUTPUT)
    mbarrier.wait(q_full, 0)
    q = q_tiles.index(HALF).reshape([ROWS, D])
    mbarrier.wait(k_full.index(0), 0)
    keys = k_tiles.index(0).reshape([COLUMNS, D]).permute((1, 0))
    s = warpgroup_mma_wait(0, [warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)])
    mbarrier.arrive(k_empty.index(0))
    if BORDER:
        corner = first_origin(starts, visits, inner, inner_visits, KEYS, INNER, BORDER)
        s = gl.where(visible(shift(corner, steps), lo, count, QUERIES, KEYS), s, float("-inf"))
    m = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    l = gl.zeros([ROWS], gl.float32, ROW)
    p, decay, m, l = softmax_weights(m, l, s, factor)
    weights = gl.convert_layout(p.to(dtype), WEIGHTS)

    # the logits of every further tile, beside the values of the tile before
    total = visits[0] * visits[1] * visits[2]
    mbarrier.wait(k_full.index(1 % STAGES), 1 // STAGES & 1, pred=total > 1)
    done, begun = 0, 1
    for MASKED in gl.static_range(1 - INNER, 1 + BORDER):
        visited = tile_count(visits, inner_visits, MASKED)
        for i in range(begun, visited):
            t = done + i
            slot, before = t % STAGES, (t - 1) % STAGES
            mbarrier.wait(turns.index(HALF), (t - HALF) & 1)
            keys = k_tiles.index(slot).reshape([COLUMNS, D]).permute((1, 0))
            s_pending = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), (t - 1) // STAGES & 1)
            values = v_tiles.index(before).reshape([COLUMNS, D])
            acc_pending = warpgroup_mma(weights, values, acc, is_async=True)
            mbarrier.arrive(turns.index(1 - HALF))
            s = warpgroup_mma_wait(1, [s_pending])
            mbarrier.arrive(k_empty.index(slot))
            if MASKED:
                corner = tile_origin(i, starts, visits, inner, inner_visits, KEYS, MASKED, INNER)
                s = gl.where(visible(shift(corner, steps), lo, count, QUERIES, KEYS), s, float("-inf"))
            p, decay, m, l = softmax_weights(m, l, s, factor)
            following = gl.convert_layout(p.to(dtype), WEIGHTS)
            # the keys of the next tile: also keeps the assembler from moving the exponentials behind the product
            after = t + 1
            mbarrier.wait(k_full.index(after % STAGES), after // STAGES & 1, pred=after < total)
            acc, weights, following = warpgroup_mma_wait(0, [acc_pending, weights, following])
            mbarrier.arrive(v_empty.index(before))
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, OUTPUT))[:, None]
            weights = following
        done += visited
        begun = gl.maximum(begun - visited, 0)

    # the values of the last tile
    before = (done - 1) % STAGES
    mbarrier.wait(v_full.index(before), (done - 1) // STAGES & 1)
    values = v_tiles.index(before).reshape([COLUMNS, D])
    acc = warpgroup_mma_wait(0, [warpgroup_mma(weights, values, acc, is_async=True)])

    # log-sum-exp and output, the latter by 16 bytes a thread
    gl.store(lse[0] + offset(row, lse[1]), (m + gl.log2(l)) * LN2, mask=inside(row, nq))
    BLOCKED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    result = (acc / gl.convert_layout(l, gl.SliceLayout(1, OUTPUT))[:, None]).to(dtype)
    row = shift(first, coordinates(HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, BLOCKED)), QUERIES))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, BLOCKED))
    pointers = out[0] + offset(row, out[1])[:, None] + d[None, :]
    gl.store(pointers, gl.convert_layout(result, BLOCKED), mask=inside(row, nq)[:, None])


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
    q_ptr, q_sp = group_view(q_ptr, q_strides, batch, head, origin, DILATION, WIDE)
    k_ptr, k_sp = group_view(k_ptr, k_strides, batch, head // GROUP, group, DILATION, WIDE)
    v_ptr, v_sp = group_view(v_ptr, v_strides, batch, head // GROUP, group, DILATION, WIDE)
    out_ptr, out_sp = group_view(out_ptr, out_strides, batch, head, origin, DILATION, WIDE)
    lse_ptr, lse_sp = group_view(lse_ptr, row_strides(counts, heads), batch, head, origin, DILATION, WIDE)
    walk = spans(first, n, begin, nq, QUERIES, KEYS, WINDOW, STRIDE, CAUSAL, False, PART)

    BOX: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    SHAPE: gl.constexpr = [STAGES, KEYS[0], KEYS[1], KEYS[2], D]
    q_tiles = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [CONSUMERS, SHARE[0], SHARE[1], SHARE[2], D], BOX)
    k_tiles = gl.allocate_shared_memory(k_ptr.dtype.element_ty, SHAPE, BOX)
    v_tiles = gl.allocate_shared_memory(v_ptr.dtype.element_ty, SHAPE, BOX)
    q_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BAR)
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()

    tiles, bars = (q_tiles, k_tiles, v_tiles), (q_full, k_full, k_empty, v_full, v_empty)
    out, lse, places, factor = (out_ptr, out_sp), (lse_ptr, lse_sp), (first, n, begin, nq), scale * LOG2E
    gl.warp_specialize(
        [
            (consumer, (out, lse, places, walk, tiles, bars, turns, factor, 0,
                        D, QUERIES, KEYS, WINDOW, STRIDE, CAUSAL, PART, INNER, BORDER, STAGES)),
            (consumer, (out, lse, places, walk, tiles, bars, turns, factor, 1,
                        D, QUERIES, KEYS, WINDOW, STRIDE, CAUSAL, PART, INNER, BORDER, STAGES)),
            (producer, ((q_ptr, q_sp), (k_ptr, k_sp), (v_ptr, v_sp), places, walk, tiles, bars,
                        D, QUERIES, SHARE, KEYS, INNER, BORDER, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
