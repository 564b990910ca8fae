"""Steps of forwards in Gluon for Hopper, in which warps of a program do different parts of the work.

A producer, one warp, copies the queries and then tiles of keys and values into rings of buffers. Two consumers, four
warps each, own half of the queries each. A consumer begins the logits of a tile together with the product of weights
and values of the tile before, and makes the new weights while the latter runs. The consumers take turns at the matrix
units, so that one multiplies while the other is busy with exponentials (FlashAttention-3, arXiv:2407.08608, section 3).

A buffer has two barriers: `full` once its copy has arrived, `empty` once both consumers have read it. `SHARE` is the
box of queries of a consumer, `TILE` that of keys, `COLUMNS` the keys in it; tiles are counted from 0.
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

from .memory import inside, offset
from .softmax import softmax_weights

ROWS = gl.constexpr(64)  # queries of a consumer: the rows of a matrix instruction of four warps
CONSUMERS = gl.constexpr(2)


@gluon.jit
def describe(ptr, strides, lengths, D: gl.constexpr, TILE: gl.constexpr):
    """Tensor descriptor of `[X, Y, Z, D]` whose boxes are tiles; reads outside of it give zero."""
    BOX: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return tma.make_tensor_descriptor(
        ptr,
        [lengths[0], lengths[1], lengths[2], D],
        [strides[0], strides[1], strides[2], 1],
        [TILE[0], TILE[1], TILE[2], D],
        BOX,
    )


@gluon.jit
def make_rings(ptr, SHARE: gl.constexpr, TILE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Buffers of queries, keys and values of the dtype of `ptr`, their barriers, and those of the consumers' turns."""
    BOX: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    dtype = ptr.dtype.element_ty
    q_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, SHARE[0], SHARE[1], SHARE[2], D], BOX)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE[0], TILE[1], TILE[2], D], BOX)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE[0], TILE[1], TILE[2], D], BOX)
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
    return (q_tiles, k_tiles, v_tiles), (q_full, k_full, k_empty, v_full, v_empty), turns


@gluon.jit
def copy_queries(q_desc, first, second, tiles, bars, D: gl.constexpr):
    """Copy the queries of both consumers, which begin at `first` and `second`."""
    mbarrier.expect(bars[0], 2 * D * CONSUMERS * ROWS)
    tma.async_copy_global_to_shared(q_desc, [first[0], first[1], first[2], 0], bars[0], tiles[0].index(0))
    tma.async_copy_global_to_shared(q_desc, [second[0], second[1], second[2], 0], bars[0], tiles[0].index(1))


@gluon.jit
def copy_tile(
    k_desc, v_desc, origin, t, tiles, bars, D: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Copy keys and values of tile `t`, which begins at `origin`, once their buffers are free."""
    _, k_full, k_empty, v_full, v_empty = bars
    BYTES: gl.constexpr = 2 * D * TILE[0] * TILE[1] * TILE[2]
    slot, phase = t % STAGES, t // STAGES & 1
    x, y, z = origin
    # a fresh barrier counts as past its phase 1, so the first round finds all buffers empty
    mbarrier.wait(k_empty.index(slot), phase ^ 1)
    mbarrier.expect(k_full.index(slot), BYTES)
    tma.async_copy_global_to_shared(k_desc, [x, y, z, 0], k_full.index(slot), tiles[1].index(slot))
    mbarrier.wait(v_empty.index(slot), phase ^ 1)
    mbarrier.expect(v_full.index(slot), BYTES)
    tma.async_copy_global_to_shared(v_desc, [x, y, z, 0], v_full.index(slot), tiles[2].index(slot))


@gluon.jit
def first_logits(tiles, bars, HALF: gl.constexpr, D: gl.constexpr, COLUMNS: gl.constexpr):
    """Logits `[ROWS, COLUMNS]` of the first tile, which nothing overlaps."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )
    q_full, k_full, k_empty, _, _ = bars
    mbarrier.wait(q_full, 0)
    q = tiles[0].index(HALF).reshape([ROWS, D])
    mbarrier.wait(k_full.index(0), 0)
    keys = tiles[1].index(0).reshape([COLUMNS, D]).permute((1, 0))
    zero = gl.zeros([ROWS, COLUMNS], gl.float32, LOGITS)
    s = warpgroup_mma_wait(0, [warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)])
    mbarrier.arrive(k_empty.index(0))
    return s


@gluon.jit
def first_weights(
    s, factor, total, like, bars, D: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Weights of the first of `total` tiles from its logits, empty output, maximum and sum of each row.

    `like` is a pointer to the dtype of the weights. The keys of the second tile have arrived.
    """
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    m = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    l = gl.zeros([ROWS], gl.float32, ROW)
    p, _, m, l = softmax_weights(m, l, s, factor)
    weights = gl.convert_layout(p.to(like.dtype.element_ty), gl.DotOperandLayout(0, OUTPUT, 2))
    mbarrier.wait(bars[1].index(1 % STAGES), 1 // STAGES & 1, pred=total > 1)
    return weights, gl.zeros([ROWS, D], gl.float32, OUTPUT), m, l


@gluon.jit
def begin_tile(
    t, weights, acc, tiles, bars, turns,
    HALF: gl.constexpr, D: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """In this consumer's turn begin the logits of tile `t`, whose keys have arrived, and add the values of the tile
    before; returns the logits, and the output that is being made."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )
    _, _, k_empty, v_full, _ = bars
    slot, before = t % STAGES, (t - 1) % STAGES
    q = tiles[0].index(HALF).reshape([ROWS, D])
    keys = tiles[1].index(slot).reshape([COLUMNS, D]).permute((1, 0))
    values = tiles[2].index(before).reshape([COLUMNS, D])
    zero = gl.zeros([ROWS, COLUMNS], gl.float32, LOGITS)
    mbarrier.wait(turns.index(HALF), (t - HALF) & 1)
    s_pending = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), (t - 1) // STAGES & 1)
    acc_pending = warpgroup_mma(weights, values, acc, is_async=True)
    mbarrier.arrive(turns.index(1 - HALF))
    s = warpgroup_mma_wait(1, [s_pending])
    mbarrier.arrive(k_empty.index(slot))
    return s, acc_pending


@gluon.jit
def end_tile(
    t, total, s, weights, acc_pending, m, l, factor, bars, D: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Make the weights of tile `t`, wait for the output so far and rescale it; returns both, maximum and sum.

    The keys of the next tile have arrived: to wait for them between the exponentials and the product also keeps the
    assembler from moving the former behind the latter.
    """
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    _, k_full, _, _, v_empty = bars
    p, decay, m, l = softmax_weights(m, l, s, factor)
    following = gl.convert_layout(p.to(weights.dtype), gl.DotOperandLayout(0, OUTPUT, 2))
    after = t + 1
    mbarrier.wait(k_full.index(after % STAGES), after // STAGES & 1, pred=after < total)
    acc, weights, following = warpgroup_mma_wait(0, [acc_pending, weights, following])
    mbarrier.arrive(v_empty.index((t - 1) % STAGES))
    decay = gl.convert_layout(decay, gl.SliceLayout(1, OUTPUT))
    return following, acc * decay[:, None], m, l


@gluon.jit
def last_values(t, weights, acc, tiles, bars, D: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr):
    """The output, not yet divided by the sum of weights, with the values of tile `t`, the last."""
    mbarrier.wait(bars[3].index(t % STAGES), t // STAGES & 1)
    values = tiles[2].index(t % STAGES).reshape([COLUMNS, D])
    return warpgroup_mma_wait(0, [warpgroup_mma(weights, values, acc, is_async=True)])


@gluon.jit
def divided(acc, l, D: gl.constexpr):
    """The output divided by the sum of weights of each row."""
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    return acc / gl.convert_layout(l, gl.SliceLayout(1, OUTPUT))[:, None]


@gluon.jit
def store_output(ptr, strides, x, row, lengths, D: gl.constexpr):
    """Store `x [ROWS, D]` at positions `row` inside of a grid, by 16 bytes a thread; rows are of the layout that
    `output_rows` has."""
    BLOCKED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    d = gl.arange(0, D, layout=gl.SliceLayout(0, BLOCKED))
    pointers = ptr + offset(row, strides)[:, None] + d[None, :]
    x = gl.convert_layout(x.to(ptr.dtype.element_ty), BLOCKED)
    gl.store(pointers, x, mask=inside(row, lengths)[:, None])


@gluon.jit
def output_rows(D: gl.constexpr):
    """Numbers of the rows of a consumer, as `store_output` takes them."""
    BLOCKED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    return gl.arange(0, ROWS, layout=gl.SliceLayout(1, BLOCKED))
