"""Vectors of heads in one or two parts along their features, each as long as a power of two.

Triton's matrices have such sides. Of a head of 72 features in a matrix of 128, 1.8 times as many products are done as
are needed; in parts of 64 and 16 it is 1.1. A tile of vectors is a tuple of its parts, whose widths are a tuple of
constants, `launching.feature_parts`. (Triton 3.6 takes an entry of such a tuple for a constant only by a name.)
"""

import triton
import triton.language as tl


@triton.jit
def zeros(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """Float32 zeros for `ROWS` vectors."""
    FIRST: tl.constexpr = WIDTHS[0]
    if len(WIDTHS) > 1:
        SECOND: tl.constexpr = WIDTHS[1]
        return (tl.zeros([ROWS, FIRST], tl.float32), tl.zeros([ROWS, SECOND], tl.float32))
    else:
        return (tl.zeros([ROWS, FIRST], tl.float32),)


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
    ptr, rows, stride_d, keep, BEGIN: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr
):
    d = BEGIN + tl.arange(0, WIDTH)
    pointers = ptr + rows[:, None] + (d.to(rows.dtype) * stride_d)[None, :]
    if CHECK:
        return tl.load(pointers, mask=keep[:, None] & (d < D)[None, :], other=0.0)
    elif BEGIN + WIDTH > D:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_vectors(ptr, rows, stride_d, keep, D: tl.constexpr, WIDTHS: tl.constexpr, CHECK: tl.constexpr = True):
    """Vectors of `D` features, `rows` elements after `ptr`; zero past them and, with `CHECK`, where not kept."""
    FIRST: tl.constexpr = WIDTHS[0]
    if len(WIDTHS) > 1:
        SECOND: tl.constexpr = WIDTHS[1]
        return (
            _load_part(ptr, rows, stride_d, keep, 0, D, FIRST, CHECK),
            _load_part(ptr, rows, stride_d, keep, FIRST, D, SECOND, CHECK),
        )
    else:
        return (_load_part(ptr, rows, stride_d, keep, 0, D, FIRST, CHECK),)


@triton.jit
def store_vectors(ptr, rows, x, keep, D: tl.constexpr, WIDTHS: tl.constexpr):
    """The inverse of `load_vectors`, in the type of `ptr`; features lie next to each other."""
    FIRST: tl.constexpr = WIDTHS[0]
    _store_part(ptr, rows, x[0], keep, 0, D, FIRST)
    if len(WIDTHS) > 1:
        SECOND: tl.constexpr = WIDTHS[1]
        _store_part(ptr, rows, x[1], keep, FIRST, D, SECOND)


@triton.jit
def _store_part(ptr, rows, x, keep, BEGIN: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    d = BEGIN + tl.arange(0, WIDTH)
    mask = keep[:, None] & (d < D)[None, :]
    tl.store(ptr + rows[:, None] + d[None, :], x.to(ptr.dtype.element_ty), mask=mask)
