"""Steps of scored attention on a tile of pairs: tiles by list, hidden pairs, weights and their gradients.

Logits are base 2. Numbers of rows come expanded, `[rows, 1]` or, for transposed tiles, `[1, rows]`.
"""

import triton
import triton.language as tl

from ..common.triton.softmax import LN2, LOG2E


@triton.jit
def program(tokens, heads, TILE: tl.constexpr):
    """Batch entry, head and tile of this program; tiles vary fastest."""
    tiles = tl.cdiv(tokens, TILE)
    tile, slice = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    return slice // heads, slice % heads, tile


@triton.jit
def place(list_ptr, step, TILE: tl.constexpr, LISTED: tl.constexpr):
    """First token of the tile that a step takes, and 1 where a mask hides some pair of it; see `lists.tile_lists`."""
    if LISTED:
        entry = tl.load(list_ptr + 1 + step)
        return entry // 2 * TILE, entry % 2
    else:
        return step * TILE, 0


@triton.jit
def hide(x, partial, interval_ptr, position, column, keys, INTERVALS: tl.constexpr):
    """Logits, minus infinity where `partial` says that there are hidden pairs and a query does not see a key.

    Positions of queries and `column`, the keys, are expanded to both axes of `x`.
    """
    if partial != 0:
        there = column < keys
        x = tl.where(there, x, float("-inf"))
        for i in tl.static_range(INTERVALS):
            start = tl.load(interval_ptr + 2 * i * keys + column, mask=there, other=0)
            end = tl.load(interval_ptr + (2 * i + 1) * keys + column, mask=there, other=0)
            x = tl.where((position >= start) & (position < end), float("-inf"), x)
    return x


@triton.jit
def count_of(count_ptr, row, keep, keys, COUNTED: tl.constexpr):
    """Number of keys that each row sees, float32; all where `COUNTED` does not hold."""
    if COUNTED:
        return tl.load(count_ptr + row, mask=keep, other=1.0)
    else:
        return tl.zeros_like(row).to(tl.float32) + keys


@triton.jit
def load_lse(lse_ptr, token, keep):
    """Base-2 log-sum-exp of rows, plus infinity where a row sees nothing: weights are then zero."""
    lse = tl.load(lse_ptr + token, mask=keep, other=float("inf")) * LOG2E
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def load_statistics(stat_ptr, token, rows, keep, KIND: tl.constexpr, POWER: tl.constexpr):
    """`total`, `peak` and `mass` of rows, see `call.statistics`; zeros where a formula has none."""
    total = tl.zeros(token.shape, tl.float32)
    peak, mass = total, total
    if KIND == "softplus" or KIND == "parallax":
        total = tl.load(stat_ptr + token, mask=keep, other=1.0)
    if POWER:
        peak = tl.load(stat_ptr + rows + token, mask=keep, other=0.0)
        mass = tl.load(stat_ptr + rows + rows + token, mask=keep, other=1.0)
    return total, peak, mass


@triton.jit
def with_sign(p, s):
    """Weights with the signs of logits; 0 for a logit of 0."""
    return tl.where(s < 0, -p, tl.where(s == 0, 0.0, p))


@triton.jit
def softplus(x):
    """Softplus of base-2 logits and its derivative, the sigmoid, both of natural logits; 0 and 0 of hidden pairs."""
    e = tl.exp2(-tl.abs(x))
    # log(1 + e) = 2 artanh(z) by its series: exact where e is small, and within 1e-8 at 1
    z = e / (2.0 + e)
    y = z * z
    tail = y * (1 / 7 + y * (1 / 9 + y * (1 / 11 + y * (1 / 13 + y * (1 / 15)))))
    series = 1.0 + y * (1 / 3 + y * (1 / 5 + tail))
    return tl.maximum(x, 0.0) * LN2 + 2.0 * z * series, tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def excess_of(f, share, offset):
    """Excess of `share` times softplus over `offset`, not above 0 where it is within the rounding of float32."""
    t = f * share - offset
    return tl.where(t <= 5e-7 * tl.abs(offset), tl.minimum(t, 0.0), t)


@triton.jit
def sharpen(x, f, share, peak, power, offset):
    """Excess over the mean weight, 1 where there is none, and its power over that of the largest, `peak`, or 0."""
    t = excess_of(f, share, offset)
    none = (t <= 0) | (x == float("-inf"))
    ratio = tl.where(none, 1.0, t) / tl.where(peak <= 0, 1.0, peak)
    return tl.where(none, 1.0, t), tl.where(none, 0.0, tl.exp2(power * tl.log2(ratio)))


@triton.jit
def count_gates(x, later, AXIS: tl.constexpr):
    """Gates of pairs, and the position of each: the sum of the gates from it on, `later` of them behind the tile."""
    e = tl.exp2(-tl.abs(x))
    gate = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    return gate, tl.cumsum(gate, AXIS, reverse=True) + later


@triton.jit
def add_exactly(sum, lost, x):
    """A running sum with `x`, and what its roundings have lost so far: their sum is rounded once (Knuth's TwoSum)."""
    found = sum + x
    taken = found - sum
    return found, lost + ((sum - (found - taken)) + (x - taken))


@triton.jit
def known_rows(row, queries, heads, POSITIONS: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of rows of `[queries, heads, POSITIONS]`, those behind the last one's."""
    row = tl.minimum(row, queries - 1)
    if WIDE:
        row = row.to(tl.int64)
    return row * (heads * POSITIONS)


@triton.jit
def interpolate(known_ptr, rows, at, POSITIONS: tl.constexpr):
    """Positions within the table, the table of each row between two of them, and the slope there; `rows` are offsets
    as `known_rows` has them, expanded."""
    at = tl.minimum(at, POSITIONS - 1.0)
    below = tl.floor(at)
    index = tl.minimum(tl.maximum(below.to(tl.int32), 0), POSITIONS - 1)  # whatever NaN becomes stays inside
    low = tl.load(known_ptr + rows + index)
    high = tl.load(known_ptr + rows + tl.minimum(index + 1, POSITIONS - 1))
    slope = tl.where(at == below, 0.0, high - low)
    return at, low + (at - below) * slope, slope


@triton.jit
def weigh(
    s, x, g, tilt, lse2, delta, total, peak, mass, count, sums, power, offset,
    KIND: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """Weights of values, gradients of natural logits and, of Parallax, of tilts, for gradients `g` of the weights.

    Of rows: base-2 log-sum-exp, `delta` = sum of weights times `g`, and `total`, `peak` and `mass`, which
    `call.statistics` names; `total` is of Parallax the mean tilt.
    """
    if KIND == "softplus":
        f, sigmoid = softplus(x)
        plain, dplain = f / total, (g - delta) / total
        if POWER:
            excess, b = sharpen(x, f, count / total, peak, power, offset)
            w = b / mass
            d = (count * power * w / excess * (g - delta) - sums) / total
            kept = (peak <= 0) == 0  # NaN counts as kept, so that it shows
            return tl.where(kept, w, plain), sigmoid * tl.where(kept, d, dplain), w
        else:
            return plain, sigmoid * dplain, plain
    else:
        p = tl.exp2(x - lse2)
        if KIND == "parallax":
            return p * (1.0 + total - tilt), p * (g + (tilt - total) * (sums - g) - delta), p * (sums - g)
        elif KIND == "signed":
            w = with_sign(p, s)
            return w, tl.where(s == 0, 0.0, p * g - w * delta), w
        else:
            return p, p * (g - delta), p
