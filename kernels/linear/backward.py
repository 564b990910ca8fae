"""Backward kernels of linear attention. No atomics: what several programs contribute to, each writes apart.

With the state M that queries meet, z the vector of the normaliser n = q z (+ eps, or at least the floor), u = q M and
out = u / n (+ mean value):

    dn = -(dO u) / n^2                dq = dO M^T / n + dn z
    dM = sum q^T dO / n               dz = sum dn q
    dk = v (c dM)^T + dz              dv = k (c dM)

c is the factor of the state. When centred, v and k are less their means, there is no z, and the mean of dO is added to
dv.
dO u is q (dO M^T) where a program has all features of the queries, n dO out where it has a block of them.
"""

import triton
import triton.language as tl

from ..common.triton.memory import elements, head_view, load_tile, store_tile
from ..common.triton.rounding import rounded
from .tile import (
    finish,
    load_matrix,
    load_sums,
    multiplier,
    offset,
    positive,
    program,
    state_view,
    store_matrix,
)


@triton.jit
def query_kernel(
    q_ptr, q_strides, q_inner, do_ptr, do_strides, do_inner, out_ptr, state_ptr, scale_ptr, dq_ptr, dstate_ptr,
    queries, batches, heads, chunk, share, scale, floor,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    RELU: tl.constexpr, SCALES: tl.constexpr, MEAN: tl.constexpr, CENTERED: tl.constexpr, NORMALISER: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STATE_PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ `[B, queries, heads, D]`, and dM, dz and the sum of dO `[parts, B, heads, …]` of `chunk` queries each."""
    q_strides, do_strides = elements(q_ptr, q_strides), elements(do_ptr, do_strides)
    WHOLE: tl.constexpr = COLUMNS == BLOCK_D
    head, block, batch, part = program(heads, batches, (D + COLUMNS - 1) // COLUMNS)
    q_ptr = head_view(q_ptr, q_strides, batch, head)
    do_ptr = head_view(do_ptr, do_strides, batch, head)
    out_ptr += (batch.to(tl.int64) * queries * heads + head) * E
    dq_ptr += (batch.to(tl.int64) * queries * heads + head) * D
    state_ptr = state_view(state_ptr, batch * heads + head, D, E)
    own, e = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, BLOCK_E)
    own_sum, value_sum = load_sums(state_ptr, own, e, D, E)
    key_sum, _ = load_sums(state_ptr, tl.arange(0, BLOCK_D), e, D, E)
    factor = multiplier(scale_ptr, scale, head, share, SCALES, MEAN)
    matrix = finish(load_matrix(state_ptr, own, e, D, E), own_sum, value_sum, factor, share, CENTERED)
    transposed = tl.trans(rounded(matrix, STATE_PRECISION))
    if MEAN:
        own_sum *= share
        key_sum *= share
    dmatrix = tl.zeros([COLUMNS, BLOCK_E], tl.float32)
    dzs = tl.zeros([ROWS, COLUMNS], tl.float32)
    do_sums = tl.zeros([ROWS, BLOCK_E], tl.float32)
    # dQ per tile; gradients of the state summed over the part
    for first in tl.range(part * chunk, min(part * chunk + chunk, queries), ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        q = load_tile(q_ptr, q_strides, q_inner, row, queries, D, COLUMNS, WIDE, block * COLUMNS)
        do = load_tile(do_ptr, do_strides, do_inner, row, queries, E, BLOCK_E, WIDE)
        wide = q.to(tl.float32)
        if RELU:
            wide = positive(wide)
        dq = tl.dot(do.to(tl.float32), transposed, input_precision=STATE_PRECISION)
        if NORMALISER == "none":
            dmatrix = tl.dot(tl.trans(wide.to(q.dtype)), do, dmatrix, input_precision=PRECISION)
        else:
            if WHOLE:
                n = tl.sum(wide * key_sum[None, :], 1)
            else:
                whole = load_tile(q_ptr, q_strides, q_inner, row, queries, D, BLOCK_D, WIDE).to(tl.float32)
                n = tl.sum((positive(whole) if RELU else whole) * key_sum[None, :], 1)
            falls = (n >= floor) if NORMALISER == "floor" else (row < queries)
            n = tl.maximum(n, floor) if NORMALISER == "floor" else tl.where(row < queries, n + floor, 1.0)
            inverse = 1.0 / n
            if WHOLE:
                share_of_out = tl.sum(wide * dq, 1) * inverse
            else:
                out_row = row.to(tl.int64) if WIDE else row
                mask = (row < queries)[:, None] & (e < E)[None, :]
                out = tl.load(out_ptr + (out_row * heads * E)[:, None] + e[None, :], mask=mask, other=0.0)
                share_of_out = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
            dn = tl.where(falls, -share_of_out * inverse, 0.0)
            dq = dq * inverse[:, None] + dn[:, None] * own_sum[None, :]
            dzs += dn[:, None] * wide
            du = rounded(do.to(tl.float32) * inverse[:, None], STATE_PRECISION)
            dmatrix = tl.dot(tl.trans(wide), du, dmatrix, input_precision=STATE_PRECISION)
        if CENTERED:
            do_sums += do.to(tl.float32)
        if RELU:
            dq = tl.where(wide > 0.0, dq, 0.0)
        store_tile(dq_ptr, dq, row, queries, heads * D, D, COLUMNS, WIDE, block * COLUMNS)
    # the packed gradients of the part
    dstate_ptr = state_view(dstate_ptr, (part * batches + batch) * heads + head, D, E)
    store_matrix(dstate_ptr, dmatrix, own, e, D, E)
    tl.store(dstate_ptr + D * E + own, tl.sum(dzs, 0), mask=own < D)
    tl.store(dstate_ptr + D * E + D + e, tl.sum(do_sums, 0), mask=(e < E) & (block == 0))


@triton.jit
def key_kernel(
    k_ptr, k_strides, k_inner, v_ptr, v_strides, v_inner, state_ptr, dstate_ptr, scale_ptr, dk_ptr, dv_ptr,
    keys, batches, heads, chunk, share, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    COLUMNS_D: tl.constexpr, COLUMNS_E: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    RELU: tl.constexpr, SCALES: tl.constexpr, MEAN: tl.constexpr, CENTERED: tl.constexpr,
    WIDE: tl.constexpr, STATE_PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dK `[B, keys, heads, D]` and dV `[B, keys, heads, E]`, `chunk` keys and a block of each's features a program."""
    k_strides, v_strides = elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    head, block, batch, part = program(heads, batches, BLOCKS)
    k_ptr = head_view(k_ptr, k_strides, batch, head)
    v_ptr = head_view(v_ptr, v_strides, batch, head)
    dk_ptr += (batch.to(tl.int64) * keys * heads + head) * D
    dv_ptr += (batch.to(tl.int64) * keys * heads + head) * E
    state_ptr = state_view(state_ptr, batch * heads + head, D, E)
    dstate_ptr = state_view(dstate_ptr, batch * heads + head, D, E)
    d, own_d = tl.arange(0, BLOCK_D), block * COLUMNS_D + tl.arange(0, COLUMNS_D)
    e, own_e = tl.arange(0, BLOCK_E), block * COLUMNS_E + tl.arange(0, COLUMNS_E)
    factor = multiplier(scale_ptr, scale, head, share, SCALES, MEAN)
    # gradients of the state with its factor stay in registers
    for_keys = load_matrix(dstate_ptr, own_d, e, D, E) * factor
    for_values = load_matrix(dstate_ptr, d, own_e, D, E) * factor
    dkey_sum, dvalue_sum = load_sums(dstate_ptr, own_d, own_e, D, E)
    if MEAN:
        dkey_sum *= share
    if CENTERED:
        key_sum, value_sum = load_sums(state_ptr, d, e, D, E)
        mean_key = offset(k_ptr, k_strides, k_inner, keys, D, BLOCK_D, RELU, WIDE) + key_sum * share
        mean_value = offset(v_ptr, v_strides, v_inner, keys, E, BLOCK_E, False, WIDE) + value_sum * share
    for_keys, for_values = tl.trans(rounded(for_keys, STATE_PRECISION)), rounded(for_values, STATE_PRECISION)
    # dK and dV per tile
    for first in tl.range(part * chunk, min(part * chunk + chunk, keys), ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        k = load_tile(k_ptr, k_strides, k_inner, row, keys, D, BLOCK_D, WIDE).to(tl.float32)
        v = load_tile(v_ptr, v_strides, v_inner, row, keys, E, BLOCK_E, WIDE).to(tl.float32)
        if CENTERED:
            v = rounded(v - mean_value[None, :], STATE_PRECISION)
        dk = tl.dot(v, for_keys, input_precision=STATE_PRECISION)
        if not CENTERED:
            dk += dkey_sum[None, :]
        if RELU:
            own = k
            if COLUMNS_D != BLOCK_D:
                own = load_tile(k_ptr, k_strides, k_inner, row, keys, D, COLUMNS_D, WIDE, block * COLUMNS_D)
            dk = tl.where(own > 0.0, dk, 0.0)
            k = positive(k)
        if CENTERED:
            k = rounded(k - mean_key[None, :], STATE_PRECISION)
        store_tile(dk_ptr, dk, row, keys, heads * D, D, COLUMNS_D, WIDE, block * COLUMNS_D)
        dv = tl.dot(k, for_values, input_precision=STATE_PRECISION)
        if CENTERED:
            dv += (dvalue_sum * share)[None, :]
        store_tile(dv_ptr, dv, row, keys, heads * E, E, COLUMNS_E, WIDE, block * COLUMNS_E)
