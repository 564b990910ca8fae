"""Triton helpers of linear attention: the packed state of a head.

A state is D * E + D + E float32 numbers: a matrix, D sums of keys and E sums of values; backwards, the gradients of
these. When centred, all are of keys and values less an `offset`: the covariance is the same, and large means do
not swallow it.
"""

import triton
import triton.language as tl

from ..common.triton.memory import load_tile


@triton.jit
def positive(x):
    """max(x, 0) of float32, NaN as it is."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def program(heads, batches, BLOCKS: tl.constexpr):
    """Head, block of features, entry of the batch and part of the tokens of a program; heads are next to each other."""
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    block, rest = rest % BLOCKS, rest // BLOCKS
    return head, block, rest % batches, rest // batches


@triton.jit
def state_view(ptr, slice, D: tl.constexpr, E: tl.constexpr):
    """Pointer to one state: its matrix, and behind it the sums."""
    return ptr + slice.to(tl.int64) * (D * E + D + E)


@triton.jit
def load_matrix(ptr, d, e, D: tl.constexpr, E: tl.constexpr):
    """Rows `d` and columns `e` of a state's matrix, zeros outside."""
    return tl.load(ptr + (d * E)[:, None] + e[None, :], mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)


@triton.jit
def store_matrix(ptr, matrix, d, e, D: tl.constexpr, E: tl.constexpr):
    tl.store(ptr + (d * E)[:, None] + e[None, :], matrix, mask=(d < D)[:, None] & (e < E)[None, :])


@triton.jit
def load_sums(ptr, d, e, D: tl.constexpr, E: tl.constexpr):
    """A state's sums of keys and of values."""
    keys = tl.load(ptr + D * E + d, mask=d < D, other=0.0)
    return keys, tl.load(ptr + D * E + D + e, mask=e < E, other=0.0)


@triton.jit
def offset(
    ptr, strides, inner, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr, first=0,
):  # fmt: skip
    """Mean of up to 16 tokens of a `head_view`, `[BLOCK_D]` in float32; see `load_tile`.

    What is averaged is less it. Sums of tokens with a large mean would cost precision, and so would the covariance less
    a single token, which may lie far from the mean.
    """
    x = load_tile(ptr, strides, inner, tl.arange(0, 16), tokens, D, BLOCK_D, WIDE, first).to(tl.float32)
    return tl.sum(positive(x) if RELU else x, 0) / min(tokens, 16)


@triton.jit
def multiplier(scale_ptr, scale, head, share, SCALES: tl.constexpr, MEAN: tl.constexpr):
    """Factor of the matrix of a head: `share` is one over the keys."""
    if SCALES:
        scale *= tl.load(scale_ptr + head).to(tl.float32)
    if MEAN:
        scale *= share
    return scale


@triton.jit
def finish(matrix, key_sum, value_sum, factor, share, CENTERED: tl.constexpr):
    """Block of the matrix that queries are multiplied by, given the sums of its rows and columns."""
    if CENTERED:
        matrix -= key_sum[:, None] * (value_sum * share)[None, :]
    return matrix * factor
