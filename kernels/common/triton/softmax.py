"""Steps of softmax attention over tiles, all base 2: exp(x) is exp2(x * log2(e)).

Queries, keys, values and their gradients are tuples of parts, see `features`.
"""

import triton
import triton.language as tl

from .features import add_weighted, products, scale_rows

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_weights(m, l, s, factor):
    """One step of the online softmax over logits `s` that `factor` > 0 makes base 2.

    A row that has seen nothing yet has m = -inf and l = 0.

    Returns:
        weights of the tile, the factor on what was summed before, the new maximum and the new sum of each row.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * factor)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * factor - m_safe[:, None])
    decay = tl.exp2(m - m_safe)
    return p, decay, m_new, l * decay + tl.sum(p, 1)


@triton.jit
def softmax_step(acc, m, l, s, v, factor, PRECISION: tl.constexpr):
    """Add a tile of values to `acc`; see `softmax_weights`. Returns the output so far, the maximum and the sum."""
    p, decay, m, l = softmax_weights(m, l, s, factor)
    return add_weighted(scale_rows(acc, decay), p, v, PRECISION), m, l


@triton.jit
def logit_gradient(do, lse2, delta, s, v, factor, PRECISION: tl.constexpr):
    """dS of a tile of logits `s`, which `factor` makes base 2; `lse2` is the base-2 log-sum-exp."""
    p = tl.exp2(s * factor - lse2[:, None])
    dp = products(do, v, PRECISION)
    return p * (dp - delta[:, None])


@triton.jit
def query_step(dq, do, lse2, delta, s, k, v, factor, PRECISION: tl.constexpr):
    """Add the contribution of a tile of keys to dQ / scale; see `logit_gradient`."""
    ds = logit_gradient(do, lse2, delta, s, v, factor, PRECISION)
    return add_weighted(dq, ds, k, PRECISION)


@triton.jit
def key_step(dk, dv, q, do, lse2, delta, st, v, factor, PRECISION: tl.constexpr):
    """Add the contribution of a tile of queries to dK / scale and dV from transposed logits `[keys, queries]`."""
    pt = tl.exp2(st * factor - lse2[None, :])
    dv = add_weighted(dv, pt, do, PRECISION)
    dpt = products(v, do, PRECISION)
    dst = pt * (dpt - delta[None, :])
    dk = add_weighted(dk, dst, q, PRECISION)
    return dk, dv
