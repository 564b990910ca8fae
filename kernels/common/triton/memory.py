"""Addresses of tokens of `[B, X, Y, Z, heads, head_dim]`, and tiles of them."""

import triton
import triton.language as tl


@triton.jit
def element_stride(stride, BYTES: tl.constexpr):
    """A stride in elements of one in bytes, or 1 of 1.

    One form for both needs no branch, behind which nothing would be known of the result.
    """
    return stride - (BYTES - 1) * (stride // BYTES)


@triton.jit
def elements(ptr, strides):
    """Strides in elements of what `ptr` points to, from those that `launching.kernel_strides` made.

    Bytes that the compiler knows to be multiples of 16 give elements that it knows to fill 16 bytes, so that loads and
    stores are as wide as the hardware has them.
    """
    if strides[-1] is None:
        BYTES: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
        strides = tl.tuple([element_stride(stride, BYTES) for stride in strides[:-1]])
    return strides


@triton.jit
def offset(position, strides):
    """Element offset of positions, a 3-tuple of scalars or vectors."""
    return position[0] * strides[0] + position[1] * strides[1] + position[2] * strides[2]


@triton.jit
def inside(position, lengths):
    """Mask of the positions that lie in a grid or group of these lengths."""
    return (position[0] < lengths[0]) & (position[1] < lengths[1]) & (position[2] < lengths[2])


@triton.jit
def head_view(ptr, strides, batch, head):
    """Pointer to the first token of a batch entry and head; strides are of `[B, X, Y, Z, heads, head_dim]`."""
    return ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[4]


@triton.jit
def load_tile(
    ptr, strides, inner, token, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, first=0,
):  # fmt: skip
    """Features `[len(token), BLOCK_D]`, from feature `first` on, of tokens of a grid whose last two axes are `inner`
    long; zeros outside."""
    keep = token < tokens
    if WIDE:
        token = token.to(tl.int64)
    z, y, x = token % inner[1], token // inner[1] % inner[0], token // (inner[0] * inner[1])
    row = x * strides[1] + y * strides[2] + z * strides[3]
    d = first + tl.arange(0, BLOCK_D)
    pointers = ptr + row[:, None] + (d.to(row.dtype) * strides[5])[None, :]
    return tl.load(pointers, mask=keep[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_tile(
    ptr, value, token, tokens, stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, first=0,
):  # fmt: skip
    """Store features from `first` on of tokens that lie `stride` apart."""
    d, keep = first + tl.arange(0, BLOCK_D), token < tokens
    if WIDE:
        token = token.to(tl.int64)
    mask = keep[:, None] & (d < D)[None, :]
    tl.store(ptr + (token * stride)[:, None] + d[None, :], value.to(ptr.dtype.element_ty), mask=mask)
