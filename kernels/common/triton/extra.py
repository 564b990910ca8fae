"""Additional tokens `[B, tokens, heads, head_dim]`, which every query sees."""

import triton
import triton.language as tl

from .features import load_vectors
from .memory import elements


@triton.jit
def load_tokens(ptr, strides, tokens, see, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Vectors of extra tokens, zero where `see` is not true."""
    strides = elements(ptr, strides)
    return load_vectors(ptr, tokens.to(tl.int64) * strides[1], strides[3], see, D, BLOCK_D)


@triton.jit
def extra_view(ptr, strides, batch, key_head):
    """Pointer to the extra tokens of one batch entry and key head."""
    strides = elements(ptr, strides)
    return ptr + batch.to(tl.int64) * strides[0] + key_head.to(tl.int64) * strides[2]


@triton.jit
def extra_end(ends_ptr, batch, extra, MASKED: tl.constexpr):
    """The end of the extra tokens of a batch entry: behind the last visible one or, unless `MASKED`, `extra`."""
    if MASKED:
        return tl.load(ends_ptr + batch)
    else:
        return extra


@triton.jit
def load_extra_pair(
    k_ptr, k_strides, v_ptr, v_strides, mask_ptr, batch, first, extra,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Extra keys and values from `first` on, and whether queries see them; zero where they do not.

    With `MASKED` that is what `[B, extra]` at `mask_ptr` says, and a masked token is not read: it may hold NaN.
    """
    e = first + tl.arange(0, BLOCK)
    see = e < extra
    if MASKED:
        see &= tl.load(mask_ptr + batch.to(tl.int64) * extra + e, mask=see, other=0) != 0
    k = load_tokens(k_ptr, k_strides, e, see, D, BLOCK_D)
    v = load_tokens(v_ptr, v_strides, e, see, DV, BLOCK_DV)
    return k, v, see
