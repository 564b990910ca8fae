"""Forward kernel of window attention: one program computes a block of slots of a pack of windows of one head."""

import triton
import triton.language as tl

from ..common.triton.memory import elements, head_view
from ..common.triton.softmax import LN2, LOG2E, softmax_step
from .tile import NONE, bias_pointers, load, offset, sees, store, tile, windows


@triton.jit
def forward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, out_ptr, out_strides, lse_ptr, lse_strides, bias_ptr,
    lengths, heads, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, HALO: tl.constexpr, MARGIN: tl.constexpr,
    PACK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):
    """Strides are of `[B, X, Y, Z, heads, head_dim]`, `GROUP` query heads share a key head; see `tile` for the rest."""
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    out_strides, lse_strides = elements(out_ptr, out_strides), elements(lse_ptr, lse_strides)
    T: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    S: tl.constexpr = (WINDOW[0] + 2 * HALO[0]) * (WINDOW[1] + 2 * HALO[1]) * (WINDOW[2] + 2 * HALO[2])
    BLOCKS: tl.constexpr = (T + QUERIES - 1) // QUERIES
    # of this program: a pack of windows, a block of their slots, a head and a batch entry
    counts = windows(lengths, WINDOW)
    packs = tl.cdiv(counts[0] * counts[1] * counts[2], PACK)
    pid = tl.program_id(0)
    window, block = pid % packs * PACK, pid // packs % BLOCKS
    head, batch = pid // packs // BLOCKS % heads, pid // packs // BLOCKS // heads

    # queries stay in registers
    row, place, keep, region = tile(window, block * QUERIES, lengths, PACK, QUERIES, WINDOW, SHIFT, NONE, NONE)
    q = load(head_view(q_ptr, q_strides, batch, head), q_strides, place, keep, D, BLOCK_D, WIDE)
    k_ptr = head_view(k_ptr, k_strides, batch, head // GROUP)
    v_ptr = head_view(v_ptr, v_strides, batch, head // GROUP)
    acc = (tl.zeros([PACK * QUERIES, BLOCK_DV], tl.float32),)
    m = tl.full([PACK * QUERIES], float("-inf"), tl.float32)
    l = tl.zeros([PACK * QUERIES], tl.float32)
    # online softmax over the keys of the windows
    for first in range(0, S, KEYS):
        column, key_place, key_keep, key_region = tile(
            window, first, lengths, PACK, KEYS, WINDOW, SHIFT, HALO, MARGIN
        )
        k = load(k_ptr, k_strides, key_place, key_keep, D, BLOCK_D, WIDE)
        v = load(v_ptr, v_strides, key_place, key_keep, DV, BLOCK_DV, WIDE)
        see = sees(region, key_region, key_keep, PACK, QUERIES, KEYS, SHIFT)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        if BIAS:
            entry = bias_pointers(bias_ptr, head, row[:, None], column[None, :], WINDOW, HALO)
            s += tl.load(entry, mask=see & keep[:, None], other=0.0).to(tl.float32) * LOG2E
        s = tl.where(see, s, float("-inf"))
        acc, m, l = softmax_step(acc, m, l, s, (v,), 1.0, PRECISION)

    # normalise and store
    l = tl.where(l == 0.0, 1.0, l)  # rows that do not exist
    out_ptr = head_view(out_ptr, out_strides, batch, head)
    store(out_ptr, out_strides, place, keep, acc[0] / l[:, None], DV, BLOCK_DV, WIDE)
    lse = head_view(lse_ptr, lse_strides, batch, head) + offset(place, lse_strides, WIDE)
    tl.store(lse, (m + tl.log2(l)) * LN2, mask=keep)
