"""Tiles of the bias of agent attention."""

import triton
import triton.language as tl

from ..common.triton.softmax import LOG2E


@triton.jit
def load_bias(ptr, strides, head, row, rows, column, columns, WIDE: tl.constexpr):
    """Bias `[len(row), len(column)]` of a head times log2(e), 0 outside; strides are of `[heads, rows, columns]`."""
    see = (row < rows)[:, None] & (column < columns)[None, :]
    if WIDE:
        row, column = row.to(tl.int64), column.to(tl.int64)
    ptr += head.to(tl.int64) * strides[0] + (row * strides[1])[:, None] + (column * strides[2])[None, :]
    return tl.load(ptr, mask=see, other=0.0).to(tl.float32) * LOG2E
