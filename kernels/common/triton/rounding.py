"""float32 operands of matrix units that take them as TF32."""

import triton
import triton.language as tl


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """float32 that is nearest in TF32 once matrix units cut off its last 13 bits, where they take TF32.

    Infinities and NaN stay: the sum would turn 0x7fffffff, the NaN that NVIDIA's units make, into a negative zero.
    """
    if PRECISION == "tf32":
        nearest = (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < float("inf"), nearest, x)
    return x


@triton.jit
def operand(x, like, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """`x` as a product takes it: in the dtype of `like`, or with `WIDEN` in float32, rounded."""
    return rounded(x.to(tl.float32), PRECISION) if WIDEN else x.to(like.dtype)
