"""Forward kernels of linear attention: keys and values into a state, queries out of it.

A program takes a block of the value's features, all of them while they are few.
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
def state_kernel(
    k_ptr, k_strides, k_inner, v_ptr, v_strides, v_inner, state_ptr, keys, batches, heads, chunk,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    RELU: tl.constexpr, SUMS: tl.constexpr, CENTERED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STATE_PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """States `[parts, B, heads, …]` of `chunk` keys each; sums of keys with `SUMS`, of values with `CENTERED`."""
    k_strides, v_strides = elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    head, block, batch, part = program(heads, batches, (E + COLUMNS - 1) // COLUMNS)
    k_ptr = head_view(k_ptr, k_strides, batch, head)
    v_ptr = head_view(v_ptr, v_strides, batch, head)
    d, e = tl.arange(0, BLOCK_D), block * COLUMNS + tl.arange(0, COLUMNS)
    matrix = tl.zeros([BLOCK_D, COLUMNS], tl.float32)
    key_sums = tl.zeros([ROWS, BLOCK_D], tl.float32)
    value_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    if CENTERED:
        key_offset = offset(k_ptr, k_strides, k_inner, keys, D, BLOCK_D, RELU, WIDE)
        value_offset = offset(v_ptr, v_strides, v_inner, keys, E, COLUMNS, False, WIDE, block * COLUMNS)
    # products of keys and values, summed over the part
    for first in tl.range(part * chunk, min(part * chunk + chunk, keys), ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        k = load_tile(k_ptr, k_strides, k_inner, row, keys, D, BLOCK_D, WIDE)
        v = load_tile(v_ptr, v_strides, v_inner, row, keys, E, COLUMNS, WIDE, block * COLUMNS)
        wide = k.to(tl.float32)
        if RELU:
            wide = positive(wide)
            k = wide.to(k.dtype)
        if CENTERED:
            keep = (row < keys)[:, None]
            wide = tl.where(keep, wide - key_offset[None, :], 0.0)
            value = tl.where(keep, v.to(tl.float32) - value_offset[None, :], 0.0)
            value_sums += value
            left, right = rounded(wide, STATE_PRECISION), rounded(value, STATE_PRECISION)
            matrix = tl.dot(tl.trans(left), right, matrix, input_precision=STATE_PRECISION)
        else:
            matrix = tl.dot(tl.trans(k), v, matrix, input_precision=PRECISION)
        if SUMS:
            key_sums += wide
    # the packed state of the part
    state_ptr = state_view(state_ptr, (part * batches + batch) * heads + head, D, E)
    store_matrix(state_ptr, matrix, d, e, D, E)
    tl.store(state_ptr + D * E + d, tl.sum(key_sums, 0), mask=(d < D) & (block == 0))
    tl.store(state_ptr + D * E + D + e, tl.sum(value_sums, 0), mask=e < E)


@triton.jit
def apply_kernel(
    q_ptr, q_strides, q_inner, v_ptr, v_strides, v_inner, state_ptr, scale_ptr, out_ptr,
    queries, batches, heads, chunk, keys, share, scale, floor,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    RELU: tl.constexpr, SCALES: tl.constexpr, MEAN: tl.constexpr, CENTERED: tl.constexpr, NORMALISER: tl.constexpr,
    WIDE: tl.constexpr, STATE_PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Out `[B, queries, heads, E]`, `chunk` queries a program.

    `NORMALISER` is "none", "eps" or "floor", and `floor` the number that goes with it.
    """
    q_strides, v_strides = elements(q_ptr, q_strides), elements(v_ptr, v_strides)
    head, block, batch, part = program(heads, batches, (E + COLUMNS - 1) // COLUMNS)
    q_ptr = head_view(q_ptr, q_strides, batch, head)
    out_ptr += (batch.to(tl.int64) * queries * heads + head) * E
    state_ptr = state_view(state_ptr, batch * heads + head, D, E)
    d, e = tl.arange(0, BLOCK_D), block * COLUMNS + tl.arange(0, COLUMNS)
    # the state with its factor stays in registers
    key_sum, value_sum = load_sums(state_ptr, d, e, D, E)
    factor = multiplier(scale_ptr, scale, head, share, SCALES, MEAN)
    matrix = finish(load_matrix(state_ptr, d, e, D, E), key_sum, value_sum, factor, share, CENTERED)
    matrix = rounded(matrix, STATE_PRECISION)
    if MEAN:
        key_sum *= share
    if CENTERED:
        v_ptr = head_view(v_ptr, v_strides, batch, head)
        mean_value = offset(v_ptr, v_strides, v_inner, keys, E, COLUMNS, False, WIDE, block * COLUMNS)
        mean_value += value_sum * share
    # each tile of queries reads it
    for first in tl.range(part * chunk, min(part * chunk + chunk, queries), ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        q = load_tile(q_ptr, q_strides, q_inner, row, queries, D, BLOCK_D, WIDE).to(tl.float32)
        if RELU:
            q = positive(q)
        out = tl.dot(q, matrix, input_precision=STATE_PRECISION)
        if NORMALISER == "eps":
            out *= (1.0 / tl.where(row < queries, tl.sum(q * key_sum[None, :], 1) + floor, 1.0))[:, None]
        if NORMALISER == "floor":
            out *= (1.0 / tl.maximum(tl.sum(q * key_sum[None, :], 1), floor))[:, None]
        if CENTERED:
            out += mean_value[None, :]
        store_tile(out_ptr, out, row, queries, heads * E, E, COLUMNS, WIDE, block * COLUMNS)
