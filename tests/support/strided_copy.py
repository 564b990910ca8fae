"""A kernel that reads rows of 40 numbers by strides in bytes."""

import triton
import triton.language as tl
from foveal.kernels.common.triton.memory import elements


@triton.jit
def copy_kernel(x_ptr, strides, out_ptr):
    """Copy a matrix `[64, 40]` of a batch of those, to rows of 64."""
    strides = elements(x_ptr, strides)
    row, column = tl.arange(0, 64), tl.arange(0, 64)
    place = tl.program_id(0) * strides[0] + (row * strides[1])[:, None] + (column * strides[2])[None, :]
    x = tl.load(x_ptr + place, mask=(column < 40)[None, :], other=0.0)
    tl.store(out_ptr + (row * 64)[:, None] + column[None, :], x)
