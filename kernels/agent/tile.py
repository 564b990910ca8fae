"""What the kernels of agent attention share: addresses of tokens on a grid, tiles of them, and tiles of logits."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


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
def store_tile(ptr, value, token, tokens, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Store features of tokens that lie `stride` apart."""
    d, keep = tl.arange(0, BLOCK_D), token < tokens
    if WIDE:
        token = token.to(tl.int64)
    mask = keep[:, None] & (d < D)[None, :]
    tl.store(ptr + (token * stride)[:, None] + d[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_bias(ptr, strides, head, row, rows, column, columns, WIDE: tl.constexpr):
    """Bias `[len(row), len(column)]` of a head times log2(e), 0 outside; strides are of `[heads, rows, columns]`."""
    see = (row < rows)[:, None] & (column < columns)[None, :]
    if WIDE:
        row, column = row.to(tl.int64), column.to(tl.int64)
    ptr += head.to(tl.int64) * strides[0] + (row * strides[1])[:, None] + (column * strides[2])[None, :]
    return tl.load(ptr, mask=see, other=0.0).to(tl.float32) * LOG2E
