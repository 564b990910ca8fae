"""Forward kernels of one pass of agent attention: queries over keys with a dense bias, either of them few.

Where queries are few, the keys are split over programs; `merge_kernel` then joins what the parts found.
"""

import triton
import triton.language as tl

from ..common.triton.memory import elements, head_view, load_tile, store_tile
from ..common.triton.softmax import LOG2E, softmax_weights
from .tile import load_bias


@triton.jit
def forward_kernel(
    q_ptr, q_strides, q_inner, k_ptr, k_strides, k_inner, v_ptr, v_strides, v_inner,
    out_ptr, lse_ptr, bias_ptr, bias_strides,
    queries, keys, batches, heads, chunk, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Out `[parts, B, queries, heads, DV]` and base-2 log-sum-exp `[parts, B, heads, queries]`, of `chunk` keys."""
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    # of this program: a tile of queries, a head, a batch entry and a part of the keys
    tiles = tl.cdiv(queries, QUERIES)
    tile, slice = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, batch, part = slice % heads, slice // heads % batches, slice // (heads * batches)
    q_ptr = head_view(q_ptr, q_strides, batch, head)
    k_ptr = head_view(k_ptr, k_strides, batch, head)
    v_ptr = head_view(v_ptr, v_strides, batch, head)

    row = tile * QUERIES + tl.arange(0, QUERIES)
    q = load_tile(q_ptr, q_strides, q_inner, row, queries, D, BLOCK_D, WIDE)
    acc = tl.zeros([QUERIES, BLOCK_DV], tl.float32)
    m = tl.full([QUERIES], float("-inf"), tl.float32)
    l = tl.zeros([QUERIES], tl.float32)
    # online softmax over the keys of the part
    for first in tl.range(part * chunk, min(part * chunk + chunk, keys), KEYS, num_stages=STAGES):
        column = first + tl.arange(0, KEYS)
        k = load_tile(k_ptr, k_strides, k_inner, column, keys, D, BLOCK_D, WIDE)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        if BIAS:
            s += load_bias(bias_ptr, bias_strides, head, row, queries, column, keys, WIDE)
        s = tl.where((column < keys)[None, :], s, float("-inf"))
        p, decay, m, l = softmax_weights(m, l, s, 1.0)
        v = load_tile(v_ptr, v_strides, v_inner, column, keys, DV, BLOCK_DV, WIDE)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)

    # normalise and store; the log-sum-exp joins parts
    slice = (part * batches + batch).to(tl.int64) * queries * heads
    store_tile(out_ptr + (slice + head) * DV, acc / l[:, None], row, queries, heads * DV, DV, BLOCK_DV, WIDE)
    tl.store(lse_ptr + slice + head * queries + row, m + tl.log2(l), mask=row < queries)


@triton.jit
def merge_kernel(
    parts_ptr, part_lse_ptr, out_ptr, lse_ptr, queries, batches, heads, parts,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, QUERIES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attention over all keys from that over each part of them, part after part; see `forward_kernel`."""
    tiles = tl.cdiv(queries, QUERIES)
    tile, slice = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, batch = slice % heads, slice // heads
    row, d = tile * QUERIES + tl.arange(0, QUERIES), tl.arange(0, BLOCK_DV)
    keep = row < queries
    token = row.to(tl.int64) if WIDE else row
    acc = tl.zeros([QUERIES, BLOCK_DV], tl.float32)
    m = tl.full([QUERIES], float("-inf"), tl.float32)
    l = tl.zeros([QUERIES], tl.float32)
    # weights of the parts by their log-sum-exp, in the order of parts
    for part in tl.range(0, parts):
        found = (part * batches + batch).to(tl.int64) * queries * heads
        lse = tl.load(part_lse_ptr + found + head * queries + row, mask=keep, other=0.0)
        mask = (keep & (lse > float("-inf")))[:, None] & (d < DV)[None, :]  # a part that sees nothing holds NaN
        pointers = parts_ptr + (found + head) * DV + (token * (heads * DV))[:, None] + d[None, :]
        out = tl.load(pointers, mask=mask, other=0.0)
        m_new = tl.maximum(m, lse)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        decay, weight = tl.exp2(m - m_safe), tl.exp2(lse - m_safe)
        acc = acc * decay[:, None] + out * weight[:, None]
        l = l * decay + weight
        m = m_new
    slice = batch.to(tl.int64) * queries * heads
    store_tile(out_ptr + (slice + head) * DV, acc / l[:, None], row, queries, heads * DV, DV, BLOCK_DV, WIDE)
    tl.store(lse_ptr + slice + head * queries + row, m + tl.log2(l), mask=keep)
