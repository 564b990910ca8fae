"""Forward kernels of scored attention: one pass, or two where a row's sums come before its weights."""

import triton
import triton.language as tl

from ..common.triton.memory import elements, head_view, load_tile, store_tile
from ..common.triton.softmax import LN2, LOG2E, softmax_weights
from .tile import (
    add_exactly,
    count_gates,
    count_of,
    excess_of,
    hide,
    interpolate,
    known_rows,
    load_lse,
    place,
    program,
    sharpen,
    softplus,
    with_sign,
)


@triton.jit
def count_kernel(
    interval_ptr, position_ptr, list_ptr, count_ptr, queries, keys,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    """Numbers of keys that queries see, float32 `[slices, queries]`, by the lists of a mask `[slices, …]`."""
    tiles = tl.cdiv(queries, QUERIES)
    tile, slice = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    interval_ptr += slice * (2 * INTERVALS) * keys
    list_ptr += (slice * tiles + tile) * (1 + tl.cdiv(keys, KEYS))
    row = tile * QUERIES + tl.arange(0, QUERIES)
    position = tl.load(position_ptr + row, mask=row < queries, other=0)
    count = tl.zeros([QUERIES], tl.float32)
    for step in tl.range(0, tl.load(list_ptr)):
        first, partial = place(list_ptr, step, KEYS, True)
        column = first + tl.arange(0, KEYS)
        x = tl.zeros([QUERIES, KEYS], tl.float32)
        x = hide(x, partial, interval_ptr, position[:, None], column[None, :], keys, INTERVALS)
        count += tl.sum(tl.exp2(x), 1)
    tl.store(count_ptr + slice * queries + row, count, mask=row < queries)


@triton.jit
def forward_kernel(
    q_ptr, q_strides, q_inner, k_ptr, k_strides, k_inner, v_ptr, v_strides, v_inner, r_ptr, r_strides, r_inner,
    known_ptr, out_ptr, lse_ptr, stat_ptr, interval_ptr, position_ptr, count_ptr, list_ptr, mask_strides,
    queries, keys, heads, rows, scale, length, power, offset,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, KIND: tl.constexpr, POWER: tl.constexpr, LENGTH: tl.constexpr,
    POSITIONS: tl.constexpr, INTERVALS: tl.constexpr, COUNTED: tl.constexpr, PASS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Out and log-sum-exp of a tile of queries, or statistics of its rows.

    Strides are of `[B, X, Y, Z, heads, head_dim]`, `mask_strides` of intervals, lists and counts along batch and heads.
    `PASS` is "one", or "sums" and then "final": the first leaves statistics `[…, B, queries, heads]` and, of
    Parallax, the log-sum-exp, which the second reads. `rows` is B * queries * heads. CoPE goes from the last key to the
    first; `known_ptr` holds the products of queries and its table `[B, queries, heads, POSITIONS]`.
    """
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    batch, head, tile = program(queries, heads, QUERIES)
    q_ptr = head_view(q_ptr, q_strides, batch, head)
    k_ptr = head_view(k_ptr, k_strides, batch, head // GROUP)
    v_ptr = head_view(v_ptr, v_strides, batch, head // GROUP)
    row = tile * QUERIES + tl.arange(0, QUERIES)
    keep = row < queries
    first_token = batch.to(tl.int64) * queries * heads + head
    token = first_token + row.to(tl.int64) * heads
    q = load_tile(q_ptr, q_strides, q_inner, row, queries, D, BLOCK_D, WIDE)

    # what the mask says of this tile
    steps, position = tl.cdiv(keys, KEYS), row
    if INTERVALS > 0:
        interval_ptr += batch.to(tl.int64) * mask_strides[0] + head * mask_strides[1]
        list_ptr += batch.to(tl.int64) * mask_strides[2] + head * mask_strides[3] + tile * (1 + tl.cdiv(keys, KEYS))
        steps = tl.load(list_ptr)
        position = tl.load(position_ptr + row, mask=keep, other=0)
    if COUNTED:
        count_ptr += batch.to(tl.int64) * mask_strides[4] + head * mask_strides[5]
    if LENGTH or POWER:
        count = count_of(count_ptr, row, keep, keys, COUNTED)
    if LENGTH:
        stretch = length * LN2 * tl.log2(tl.maximum(count, 1.0))
    # what the first pass found
    if PASS == "final":
        total = tl.load(stat_ptr + token, mask=keep, other=1.0)
        if KIND == "parallax":
            lse2 = load_lse(lse_ptr, token, keep)
        else:
            peak = tl.load(stat_ptr + rows + token, mask=keep, other=0.0)
    if KIND == "parallax":
        r_strides = elements(r_ptr, r_strides)
        r_ptr = head_view(r_ptr, r_strides, batch, head)
        r = load_tile(r_ptr, r_strides, r_inner, row, queries, D, BLOCK_D, WIDE)
    if KIND == "cope":
        known_ptr += first_token * POSITIONS
        known = known_rows(row, queries, heads, POSITIONS, WIDE)

    acc = tl.zeros([QUERIES, BLOCK_DV], tl.float32)
    m = tl.full([QUERIES], float("-inf"), tl.float32)
    l = tl.zeros([QUERIES], tl.float32)
    extra = tl.zeros([QUERIES], tl.float32)  # gates so far, or the sum of tilts
    lost = tl.zeros([QUERIES], tl.float32)
    for c in tl.range(0, steps, num_stages=STAGES):
        # logits, minus infinity where hidden
        step = c
        if KIND == "cope":
            step = steps - 1 - c
        first, partial = place(list_ptr, step, KEYS, INTERVALS > 0)
        if INTERVALS == 0:
            partial = first + KEYS > keys
        column = first + tl.arange(0, KEYS)
        k = load_tile(k_ptr, k_strides, k_inner, column, keys, D, BLOCK_D, WIDE)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        if LENGTH:
            s *= stretch[:, None]
        x = s
        if KIND == "signed":
            x = tl.abs(s)
        x = hide(x, partial, interval_ptr, position[:, None], column[None, :], keys, INTERVALS)
        if KIND == "parallax":
            tilt = tl.dot(r, tl.trans(k), input_precision=PRECISION)

        # weights of the tile
        if KIND == "softplus":
            p, _ = softplus(x)
            if PASS == "sums":
                m = tl.maximum(m, tl.max(x, 1))
            if PASS == "final":
                _, b = sharpen(x, p, (count / total)[:, None], peak[:, None], power, offset)
                p = tl.where((peak <= 0)[:, None], p, b)
            l += tl.sum(p, 1)
        elif PASS == "final":
            p = tl.exp2(x - lse2[:, None]) * (1.0 + total[:, None] - tilt)
        else:
            if KIND == "cope":
                gate, at = count_gates(x, (extra + lost)[:, None], 1)
                extra, lost = add_exactly(extra, lost, tl.sum(gate, 1))
                _, bias, _ = interpolate(known_ptr, known[:, None], at, POSITIONS)
                x += bias * LOG2E
            p, decay, m, l = softmax_weights(m, l, x, 1.0)
            if PASS == "sums":
                extra = extra * decay + tl.sum(p * tilt, 1)
            else:
                acc *= decay[:, None]
            if KIND == "signed":
                p = with_sign(p, s)
        if PASS != "sums":
            v = load_tile(v_ptr, v_strides, v_inner, column, keys, DV, BLOCK_DV, WIDE)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)

    some = (l == 0.0) == 0  # NaN counts as some, so that it shows
    divisor = tl.where(some, l, 1.0)
    if PASS == "sums":
        if KIND == "parallax":
            tl.store(stat_ptr + token, extra / divisor, mask=keep)
            tl.store(lse_ptr + token, tl.where(some, (m + tl.log2(divisor)) * LN2, float("-inf")), mask=keep)
        else:
            largest, _ = softplus(m)
            tl.store(stat_ptr + token, divisor, mask=keep)
            tl.store(stat_ptr + rows + token, excess_of(largest, count / divisor, offset), mask=keep)
    else:
        if KIND != "parallax":
            acc = tl.where(some[:, None], acc / divisor[:, None], 0.0)
        out_ptr += first_token * DV
        store_tile(out_ptr, acc, row, queries, heads * DV, DV, BLOCK_DV, WIDE)
        if KIND == "softplus":
            m = tl.zeros([QUERIES], tl.float32)
            if POWER:
                stat_ptr = stat_ptr + rows + rows
            tl.store(stat_ptr + token, divisor, mask=keep)
        if KIND != "parallax":
            tl.store(lse_ptr + token, tl.where(some, (m + tl.log2(divisor)) * LN2, float("-inf")), mask=keep)
