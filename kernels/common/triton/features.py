"""Vectors of heads in one or two parts along their features, each as long as a power of two.

Triton's matrices have such sides. Of a head of 72 features in a matrix of 128, 1.8 times as many products are done as
are needed; in parts of 64 and 16 it is 1.1. A tile of vectors is a tuple of its parts, whose widths are a tuple of
constants, `launching.feature_parts`.
"""

import triton
import triton.language as tl


@triton.jit
def zeros(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """Float32 zeros for `ROWS` vectors."""
    if len(WIDTHS) > 1:
        return (tl.zeros([ROWS, WIDTHS[0]], tl.float32), tl.zeros([ROWS, WIDTHS[1]], tl.float32))
    else:
        return (tl.zeros([ROWS, WIDTHS[0]], tl.float32),)


@triton.jit
def products(a, b, PRECISION: tl.constexpr):
    """Products `[rows of a, rows of b]` of all vectors."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if len(a) > 1:
        s = tl.dot(a[1], tl.trans(b[1]), s, input_precision=PRECISION)
    return s


@triton.jit
def add_weighted(sums, weights, x, PRECISION: tl.constexpr):
    """Add to the vectors `sums` those of `x`, times `weights` `[rows of sums, rows of x]`, in the type of `x`."""
    p = weights.to(x[0].dtype)
    if len(x) > 1:
        return (
            tl.dot(p, x[0], sums[0], input_precision=PRECISION),
            tl.dot(p, x[1], sums[1], input_precision=PRECISION),
        )
    else:
        return (tl.dot(p, x[0], sums[0], input_precision=PRECISION),)


@triton.jit
def scale_rows(x, factor):
    """Vectors times a number each."""
    if len(x) > 1:
        return (x[0] * factor[:, None], x[1] * factor[:, None])
    else:
        return (x[0] * factor[:, None],)


@triton.jit
def scaled(x, factor):
    """Vectors times one number."""
    if len(x) > 1:
        return (x[0] * factor, x[1] * factor)
    else:
        return (x[0] * factor,)


@triton.jit
def hide_rows(x, keep):
    """Vectors, zero where not kept."""
    if len(x) > 1:
        return (tl.where(keep[:, None], x[0], 0.0), tl.where(keep[:, None], x[1], 0.0))
    else:
        return (tl.where(keep[:, None], x[0], 0.0),)


@triton.jit
def row_products(a, b):
    """Products of each vector of `a` with that of `b`, float32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(a) > 1:
        total += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return total


@triton.jit
def _load_part(
    ptr, rows, stride_d, keep, FIRST: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr
):
    d = FIRST + tl.arange(0, WIDTH)
    pointers = ptr + rows[:, None] + (d.to(rows.dtype) * stride_d)[None, :]
    if CHECK:
        return tl.load(pointers, mask=keep[:, None] & (d < D)[None, :], other=0.0)
    elif FIRST + WIDTH > D:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_vectors(ptr, rows, stride_d, keep, D: tl.constexpr, WIDTHS: tl.constexpr, CHECK: tl.constexpr = True):
    """Vectors of `D` features, `rows` elements after `ptr`; zero past them and, with `CHECK`, where not kept."""
    if len(WIDTHS) > 1:
        return (
            _load_part(ptr, rows, stride_d, keep, 0, D, WIDTHS[0], CHECK),
            _load_part(ptr, rows, stride_d, keep, WIDTHS[0], D, WIDTHS[1], CHECK),
        )
    else:
        return (_load_part(ptr, rows, stride_d, keep, 0, D, WIDTHS[0], CHECK),)


@triton.jit
def store_vectors(ptr, rows, x, keep, D: tl.constexpr, WIDTHS: tl.constexpr):
    """The inverse of `load_vectors`, in the type of `ptr`; features lie next to each other."""
    for part in tl.static_range(len(WIDTHS)):
        d = part * WIDTHS[0] + tl.arange(0, WIDTHS[part])
        tl.store(
            ptr + rows[:, None] + d[None, :],
            x[part].to(ptr.dtype.element_ty),
            mask=keep[:, None] & (d < D)[None, :],
        )
