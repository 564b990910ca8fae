"""Backward kernels of one pass of agent attention. No atomics: what several programs contribute to, each writes apart.

With P = 2^(S - lse), both base 2, and delta = rowsum(dO * O), dS = P * (dO V^T - delta) (arXiv:2205.14135, B.4).
"""

import triton
import triton.language as tl

from ..common.triton.memory import elements, head_view, load_tile, store_tile
from ..common.triton.softmax import LOG2E, key_step
from .tile import load_bias


@triton.jit
def query_kernel(
    q_ptr, q_strides, q_inner, k_ptr, k_strides, k_inner, v_ptr, v_strides, v_inner,
    out_ptr, do_ptr, do_strides, do_inner, lse_ptr, delta_ptr, dq_ptr, bias_ptr, bias_strides,
    queries, keys, batches, heads, chunk, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BIAS: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ `[parts, B, queries, heads, D]` from `chunk` keys each, and delta `[B, heads, queries]` for other kernels.

    `WHOLE` says that one tile holds all keys, as it mostly holds all agents: then delta is rowsum(P * dP), and the
    output is not read.
    """
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    do_strides = elements(do_ptr, do_strides)
    tiles = tl.cdiv(queries, QUERIES)
    tile, slice = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, batch, part = slice % heads, slice // heads % batches, slice // (heads * batches)
    q_ptr = head_view(q_ptr, q_strides, batch, head)
    k_ptr = head_view(k_ptr, k_strides, batch, head)
    v_ptr = head_view(v_ptr, v_strides, batch, head)
    do_ptr = head_view(do_ptr, do_strides, batch, head)
    slice = batch.to(tl.int64) * queries * heads
    out_ptr += (slice + head) * DV
    lse_ptr += slice + head * queries
    delta_ptr += slice + head * queries

    row, d = tile * QUERIES + tl.arange(0, QUERIES), tl.arange(0, BLOCK_DV)
    keep = row < queries
    q = load_tile(q_ptr, q_strides, q_inner, row, queries, D, BLOCK_D, WIDE)
    do = load_tile(do_ptr, do_strides, do_inner, row, queries, DV, BLOCK_DV, WIDE)
    # delta from the output, unless one tile holds all keys
    delta = tl.zeros([QUERIES], tl.float32)
    if not WHOLE:
        out_row = row.to(tl.int64) if WIDE else row
        mask = keep[:, None] & (d < DV)[None, :]
        out = tl.load(out_ptr + (out_row * heads * DV)[:, None] + d[None, :], mask=mask, other=0.0)
        delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    lse = tl.load(lse_ptr + row, mask=keep, other=float("inf"))

    # dQ over the keys of the part
    dq = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for first in tl.range(part * chunk, min(part * chunk + chunk, keys), KEYS, num_stages=STAGES):
        column = first + tl.arange(0, KEYS)
        k = load_tile(k_ptr, k_strides, k_inner, column, keys, D, BLOCK_D, WIDE)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        if BIAS:
            s += load_bias(bias_ptr, bias_strides, head, row, queries, column, keys, WIDE)
        v = load_tile(v_ptr, v_strides, v_inner, column, keys, DV, BLOCK_DV, WIDE)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        p = tl.where((column < keys)[None, :], tl.exp2(s - lse[:, None]), 0.0)
        if WHOLE:
            delta = tl.sum(p * dp, 1)
        dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision=PRECISION)
    tl.store(delta_ptr + row, delta, mask=keep & (part == 0))

    slice = (part * batches + batch).to(tl.int64) * queries * heads
    store_tile(dq_ptr + (slice + head) * D, dq * scale, row, queries, heads * D, D, BLOCK_D, WIDE)


@triton.jit
def key_kernel(
    q_ptr, q_strides, q_inner, k_ptr, k_strides, k_inner, v_ptr, v_strides, v_inner,
    do_ptr, do_strides, do_inner, lse_ptr, delta_ptr, dk_ptr, dv_ptr, bias_ptr, bias_strides,
    queries, keys, batches, heads, chunk, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dK `[parts, B, keys, heads, D]` and dV `[parts, B, keys, heads, DV]` from `chunk` queries each.

    Tiles of logits are computed transposed: some Triton releases miscompile the transpose of an MMA result on Hopper.
    """
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    do_strides = elements(do_ptr, do_strides)
    tiles = tl.cdiv(keys, KEYS)
    tile, slice = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, batch, part = slice % heads, slice // heads % batches, slice // (heads * batches)
    q_ptr = head_view(q_ptr, q_strides, batch, head)
    k_ptr = head_view(k_ptr, k_strides, batch, head)
    v_ptr = head_view(v_ptr, v_strides, batch, head)
    do_ptr = head_view(do_ptr, do_strides, batch, head)
    slice = batch.to(tl.int64) * queries * heads + head * queries
    lse_ptr += slice
    delta_ptr += slice
    flipped = (bias_strides[0], bias_strides[2], bias_strides[1])

    column = tile * KEYS + tl.arange(0, KEYS)
    k = load_tile(k_ptr, k_strides, k_inner, column, keys, D, BLOCK_D, WIDE)
    v = load_tile(v_ptr, v_strides, v_inner, column, keys, DV, BLOCK_DV, WIDE)
    # dK and dV over the queries of the part
    dk, dv = (tl.zeros([KEYS, BLOCK_D], tl.float32),), (tl.zeros([KEYS, BLOCK_DV], tl.float32),)
    for first in tl.range(part * chunk, min(part * chunk + chunk, queries), QUERIES, num_stages=STAGES):
        row = first + tl.arange(0, QUERIES)
        q = load_tile(q_ptr, q_strides, q_inner, row, queries, D, BLOCK_D, WIDE)
        do = load_tile(do_ptr, do_strides, do_inner, row, queries, DV, BLOCK_DV, WIDE)
        lse = tl.load(lse_ptr + row, mask=row < queries, other=float("inf"))
        delta = tl.load(delta_ptr + row, mask=row < queries, other=0.0)
        st = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        if BIAS:
            st += load_bias(bias_ptr, flipped, head, column, keys, row, queries, WIDE)
        dk, dv = key_step(dk, dv, (q,), (do,), lse, delta, st, (v,), 1.0, PRECISION)

    slice = (part * batches + batch).to(tl.int64) * keys * heads + head
    store_tile(dk_ptr + slice * D, dk[0] * scale, column, keys, heads * D, D, BLOCK_D, WIDE)
    store_tile(dv_ptr + slice * DV, dv[0], column, keys, heads * DV, DV, BLOCK_DV, WIDE)


@triton.jit
def bias_kernel(
    q_ptr, q_strides, q_inner, k_ptr, k_strides, k_inner, v_ptr, v_strides, v_inner,
    do_ptr, do_strides, do_inner, lse_ptr, delta_ptr, dbias_ptr, bias_ptr, bias_strides,
    queries, keys, batches, heads, chunk, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dBias `[parts, heads, queries, keys]` from `chunk` batch entries each; `BLOCK_D` = `BLOCK_DV` features at
    a time."""
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    do_strides = elements(do_ptr, do_strides)
    LONGER: tl.constexpr = D if D > DV else DV
    tiles, key_tiles = tl.cdiv(queries, QUERIES) * tl.cdiv(keys, KEYS), tl.cdiv(keys, KEYS)
    tile, slice = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, part = slice % heads, slice // heads
    row = tile // key_tiles * QUERIES + tl.arange(0, QUERIES)
    column = tile % key_tiles * KEYS + tl.arange(0, KEYS)
    bias = load_bias(bias_ptr, bias_strides, head, row, queries, column, keys, WIDE)
    acc = tl.zeros([QUERIES, KEYS], tl.float32)
    # sum of dS over batch entries; S and dP from a few features at a time
    for i in tl.range(0, min(chunk, batches - part * chunk)):
        batch = part * chunk + i
        q_head, k_head = head_view(q_ptr, q_strides, batch, head), head_view(k_ptr, k_strides, batch, head)
        v_head, do_head = head_view(v_ptr, v_strides, batch, head), head_view(do_ptr, do_strides, batch, head)
        s = tl.zeros([QUERIES, KEYS], tl.float32)
        dp = tl.zeros([QUERIES, KEYS], tl.float32)
        for first in tl.range(0, LONGER, BLOCK_D, num_stages=STAGES):
            q = load_tile(q_head, q_strides, q_inner, row, queries, D, BLOCK_D, WIDE, first)
            k = load_tile(k_head, k_strides, k_inner, column, keys, D, BLOCK_D, WIDE, first)
            s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
            do = load_tile(do_head, do_strides, do_inner, row, queries, DV, BLOCK_DV, WIDE, first)
            v = load_tile(v_head, v_strides, v_inner, column, keys, DV, BLOCK_DV, WIDE, first)
            dp = tl.dot(do, tl.trans(v), dp, input_precision=PRECISION)
        saved = batch.to(tl.int64) * queries * heads + head * queries + row
        lse = tl.load(lse_ptr + saved, mask=row < queries, other=float("inf"))
        delta = tl.load(delta_ptr + saved, mask=row < queries, other=0.0)
        p = tl.exp2(s * (scale * LOG2E) + bias - lse[:, None])
        acc += p * (dp - delta[:, None])
    see = (row < queries)[:, None] & (column < keys)[None, :]
    if WIDE:
        row = row.to(tl.int64)
    dbias_ptr += (part * heads + head).to(tl.int64) * queries * keys
    tl.store(dbias_ptr + (row * keys)[:, None] + column[None, :], acc, mask=see)
