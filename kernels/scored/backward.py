"""Backward kernels of scored attention. No atomics: every gradient is summed by one program in a fixed order.

With weights w of a row, dw = dO V^T and delta = sum(w dw) = rowsum(dO * O), less the gradient of the log-sum-exp:

    softmax    dS = w (dw - delta)
    signed     dS = |w| dw - w delta
    softplus   dS = sigmoid(S) (dw - delta) / Z                                 Z the sum of softplus
    power      dS = sigmoid(S) (n dt - c) / Z,   dt = power w / t (dw - delta),   t = n softplus / Z - offset
               c = sum(dt (t + offset))
    Parallax   dS = p (dw + (tilt - mean) (c - dw) - delta),   dtilt = p (c - dw),   c = sum(p dw)
    CoPE       dS = y + gate (1 - gate) (c - what later keys add to it),   y = p (dw - delta)
               c = sum(y slope), over the slope of the table at the position of the key

c comes from a sweep of its own.
"""

import triton
import triton.language as tl

from ..common.triton.memory import elements, head_view, load_tile, store_tile
from ..common.triton.softmax import LN2, LOG2E
from .tile import (
    add_exactly,
    count_gates,
    count_of,
    hide,
    interpolate,
    known_rows,
    load_lse,
    load_statistics,
    place,
    program,
    sharpen,
    softplus,
    weigh,
)


@triton.jit
def query_kernel(
    q_ptr, q_strides, q_inner, k_ptr, k_strides, k_inner, v_ptr, v_strides, v_inner, r_ptr, r_strides, r_inner,
    known_ptr, out_ptr, do_ptr, do_strides, do_inner, lse_ptr, dlse_ptr, stat_ptr, delta_ptr, sum_ptr, later_ptr,
    dq_ptr, dr_ptr, dknown_ptr, interval_ptr, position_ptr, count_ptr, list_ptr, mask_strides,
    queries, keys, heads, rows, scale, length, power, offset,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, KIND: tl.constexpr, POWER: tl.constexpr, LENGTH: tl.constexpr,
    POSITIONS: tl.constexpr, BINS: tl.constexpr, INTERVALS: tl.constexpr, COUNTED: tl.constexpr, PASS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With `PASS` "sums" c and delta of a tile of queries; else dQ and, of Parallax, dR, of CoPE the gradient of
    `known_ptr`, and in `later_ptr` what later keys add to gates and to c, `[key tiles, 2, B, queries, heads]`.

    A pass "one" finds delta itself. `BINS` is a power of two from `POSITIONS` on; see `forward_kernel`.
    """
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    do_strides = elements(do_ptr, do_strides)
    batch, head, tile = program(queries, heads, QUERIES)
    q_ptr = head_view(q_ptr, q_strides, batch, head)
    k_ptr = head_view(k_ptr, k_strides, batch, head // GROUP)
    v_ptr = head_view(v_ptr, v_strides, batch, head // GROUP)
    do_ptr = head_view(do_ptr, do_strides, batch, head)
    row = tile * QUERIES + tl.arange(0, QUERIES)
    keep = row < queries
    first_token = batch.to(tl.int64) * queries * heads + head
    token = first_token + row.to(tl.int64) * heads
    q = load_tile(q_ptr, q_strides, q_inner, row, queries, D, BLOCK_D, WIDE)
    do = load_tile(do_ptr, do_strides, do_inner, row, queries, DV, BLOCK_DV, WIDE)

    # what the mask says of this tile
    steps, position = tl.cdiv(keys, KEYS), row
    if INTERVALS > 0:
        interval_ptr += batch.to(tl.int64) * mask_strides[0] + head * mask_strides[1]
        list_ptr += batch.to(tl.int64) * mask_strides[2] + head * mask_strides[3] + tile * (1 + tl.cdiv(keys, KEYS))
        steps = tl.load(list_ptr)
        position = tl.load(position_ptr + row, mask=keep, other=0)
    if COUNTED:
        count_ptr += batch.to(tl.int64) * mask_strides[4] + head * mask_strides[5]

    # numbers of the rows, zeros where a formula has none
    lse2 = tl.zeros([QUERIES], tl.float32)
    count, sums = lse2, lse2
    if LENGTH or POWER:
        count = count_of(count_ptr, row, keep, keys, COUNTED)
    if LENGTH:
        stretch = length * LN2 * tl.log2(tl.maximum(count, 1.0))
    if KIND != "softplus":
        lse2 = load_lse(lse_ptr, token, keep)
    total, peak, mass = load_statistics(stat_ptr, token, rows, keep, KIND, POWER)
    if PASS == "final":
        sums = tl.load(sum_ptr + token, mask=keep, other=0.0)
        delta = tl.load(delta_ptr + token, mask=keep, other=0.0)
    else:
        out = load_tile(
            out_ptr + first_token * DV, (0, heads * DV, 0, 0, 0, 1), (1, 1), row, queries, DV, BLOCK_DV, WIDE
        )
        delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
        delta -= tl.load(dlse_ptr + token, mask=keep, other=0.0)
        tl.store(delta_ptr + token, delta, mask=keep)
    if KIND == "parallax":
        r_strides = elements(r_ptr, r_strides)
        r_ptr = head_view(r_ptr, r_strides, batch, head)
        r = load_tile(r_ptr, r_strides, r_inner, row, queries, D, BLOCK_D, WIDE)
        dr = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    if KIND == "cope":
        known_ptr += first_token * POSITIONS
        known = known_rows(row, queries, heads, POSITIONS, WIDE)
        gates = tl.zeros([QUERIES], tl.float32)
        lost = tl.zeros([QUERIES], tl.float32)
        added = tl.zeros([QUERIES], tl.float32)
        bins = tl.arange(0, BINS)
        dknown = tl.zeros([QUERIES, BINS], tl.float32)

    dq = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    found = tl.zeros([QUERIES], tl.float32)
    for c in tl.range(0, steps, num_stages=STAGES):
        # logits, minus infinity where hidden, and gradients of weights
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
        tilt = s
        if KIND == "parallax":
            tilt = tl.dot(r, tl.trans(k), input_precision=PRECISION)
        v = load_tile(v_ptr, v_strides, v_inner, column, keys, DV, BLOCK_DV, WIDE)
        g = tl.dot(do, tl.trans(v), input_precision=PRECISION)

        if KIND == "cope":
            if PASS == "final":
                place_of = later_ptr + (first // KEYS * 2).to(tl.int64) * rows + token
                tl.store(place_of, gates + lost, mask=keep)
                tl.store(place_of + rows, added, mask=keep)
            gate, at = count_gates(x, (gates + lost)[:, None], 1)
            gates, lost = add_exactly(gates, lost, tl.sum(gate, 1))
            at, bias, slope = interpolate(known_ptr, known[:, None], at, POSITIONS)
            ds = tl.exp2(x + bias * LOG2E - lse2[:, None]) * (g - delta[:, None])
            add = ds * slope
            if PASS == "sums":
                found += tl.sum(add, 1)
            else:
                # shares of the logits' gradient that neighbours in the table take: a hat around each
                low = tl.minimum(tl.maximum(tl.min(tl.min(at, 1), 0).to(tl.int32), 0), POSITIONS - 1)
                high = tl.minimum(tl.maximum(tl.max(tl.max(at, 1), 0).to(tl.int32) + 1, low), POSITIONS - 1)
                for n in tl.range(low, high + 1):
                    share = tl.sum(ds * tl.maximum(1.0 - tl.abs(at - n), 0.0), 1)
                    dknown += tl.where(bins[None, :] == n, share[:, None], 0.0)
                later = tl.cumsum(add, 1, reverse=True) - add + added[:, None]
                added += tl.sum(add, 1)
                ds += (sums[:, None] - later) * gate * (1.0 - gate)
        elif PASS == "sums":
            if KIND == "parallax":
                found += tl.sum(tl.exp2(x - lse2[:, None]) * g, 1)
            else:
                f, _ = softplus(x)
                share = (count / total)[:, None]
                t, b = sharpen(x, f, share, peak[:, None], power, offset)
                found += tl.sum(b / t * (t + offset) * (g - delta[:, None]), 1)
        else:
            _, ds, dt = weigh(
                s, x, g, tilt, lse2[:, None], delta[:, None], total[:, None], peak[:, None], mass[:, None],
                count[:, None], sums[:, None], power, offset, KIND, POWER,
            )
            if LENGTH:
                ds *= stretch[:, None]
            if KIND == "parallax":
                dr = tl.dot(dt.to(k.dtype), k, dr, input_precision=PRECISION)
        if PASS != "sums":
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    if PASS == "sums":
        if POWER:
            found *= power / mass
        tl.store(sum_ptr + token, found, mask=keep)
    else:
        store_tile(dq_ptr + first_token * D, dq * scale, row, queries, heads * D, D, BLOCK_D, WIDE)
        if KIND == "parallax":
            store_tile(dr_ptr + first_token * D, dr, row, queries, heads * D, D, BLOCK_D, WIDE)
        if KIND == "cope":
            dknown_ptr += first_token * POSITIONS
            store_tile(dknown_ptr, dknown, row, queries, heads * POSITIONS, POSITIONS, BINS, WIDE)


@triton.jit
def key_kernel(
    q_ptr, q_strides, q_inner, k_ptr, k_strides, k_inner, v_ptr, v_strides, v_inner, r_ptr, r_strides, r_inner,
    known_ptr, do_ptr, do_strides, do_inner, lse_ptr, stat_ptr, delta_ptr, sum_ptr, later_ptr,
    dk_ptr, dv_ptr, interval_ptr, position_ptr, count_ptr, list_ptr, mask_strides,
    queries, keys, heads, rows, scale, length, power, offset,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, KIND: tl.constexpr, POWER: tl.constexpr, LENGTH: tl.constexpr,
    POSITIONS: tl.constexpr, INTERVALS: tl.constexpr, COUNTED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys, over the queries of `GROUP` heads.

    Tiles of logits are computed transposed: some Triton releases miscompile the transpose of an MMA result on Hopper.
    """
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    do_strides = elements(do_ptr, do_strides)
    if KIND == "parallax":
        r_strides = elements(r_ptr, r_strides)
    batch, key_head, tile = program(keys, heads // GROUP, KEYS)
    column = tile * KEYS + tl.arange(0, KEYS)
    k_ptr = head_view(k_ptr, k_strides, batch, key_head)
    v_ptr = head_view(v_ptr, v_strides, batch, key_head)
    k = load_tile(k_ptr, k_strides, k_inner, column, keys, D, BLOCK_D, WIDE)
    v = load_tile(v_ptr, v_strides, v_inner, column, keys, DV, BLOCK_DV, WIDE)

    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_DV], tl.float32)
    for i in range(GROUP):
        head = key_head * GROUP + i
        head_q = head_view(q_ptr, q_strides, batch, head)
        head_do = head_view(do_ptr, do_strides, batch, head)
        head_r = q_ptr
        if KIND == "parallax":
            head_r = head_view(r_ptr, r_strides, batch, head)
        first_token = batch.to(tl.int64) * queries * heads + head
        steps, head_intervals, head_list, head_counts = tl.cdiv(queries, QUERIES), q_ptr, q_ptr, q_ptr
        if INTERVALS > 0:
            head_intervals = interval_ptr + batch.to(tl.int64) * mask_strides[0] + head * mask_strides[1]
            head_list = list_ptr + batch.to(tl.int64) * mask_strides[2] + head * mask_strides[3]
            head_list += tile * (1 + tl.cdiv(queries, QUERIES))
            steps = tl.load(head_list)
        if COUNTED:
            head_counts = count_ptr + batch.to(tl.int64) * mask_strides[4] + head * mask_strides[5]

        for c in tl.range(0, steps, num_stages=STAGES):
            # numbers of the rows, weights of zero behind the last
            first, partial = place(head_list, c, QUERIES, INTERVALS > 0)
            if INTERVALS == 0:
                partial = tile * KEYS + KEYS > keys
            row = first + tl.arange(0, QUERIES)
            keep = row < queries
            token = first_token + row.to(tl.int64) * heads
            position = row
            if INTERVALS > 0:
                position = tl.load(position_ptr + row, mask=keep, other=0)
            delta = tl.load(delta_ptr + token, mask=keep, other=0.0)
            lse2 = tl.zeros([QUERIES], tl.float32)
            count, sums = lse2, lse2
            if LENGTH or POWER:
                count = count_of(head_counts, row, keep, keys, COUNTED)
            if KIND != "softplus":
                lse2 = load_lse(lse_ptr, token, keep)
            total, peak, mass = load_statistics(stat_ptr, token, rows, keep, KIND, POWER)
            if POWER or KIND == "parallax" or KIND == "cope":
                sums = tl.load(sum_ptr + token, mask=keep, other=0.0)

            # logits, minus infinity where hidden, and gradients of weights
            q = load_tile(head_q, q_strides, q_inner, row, queries, D, BLOCK_D, WIDE)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
            if LENGTH:
                stretch = length * LN2 * tl.log2(tl.maximum(count, 1.0))
                s *= stretch[None, :]
            x = s
            if KIND == "signed":
                x = tl.abs(s)
            x = hide(x, partial, head_intervals, position[None, :], column[:, None], keys, INTERVALS)
            tilt = s
            if KIND == "parallax":
                r = load_tile(head_r, r_strides, r_inner, row, queries, D, BLOCK_D, WIDE)
                tilt = tl.dot(k, tl.trans(r), input_precision=PRECISION)
            do = load_tile(head_do, do_strides, do_inner, row, queries, DV, BLOCK_DV, WIDE)
            g = tl.dot(v, tl.trans(do), input_precision=PRECISION)

            if KIND == "cope":
                place_of = later_ptr + (tile * 2).to(tl.int64) * rows + token
                gates = tl.load(place_of, mask=keep, other=0.0)
                added = tl.load(place_of + rows, mask=keep, other=0.0)
                known = known_rows(row, queries, heads, POSITIONS, WIDE)
                gate, at = count_gates(x, gates[None, :], 0)
                _, bias, slope = interpolate(known_ptr + first_token * POSITIONS, known[None, :], at, POSITIONS)
                w = tl.exp2(x + bias * LOG2E - lse2[None, :])
                ds = w * (g - delta[None, :])
                add = ds * slope
                later = tl.cumsum(add, 0, reverse=True) - add + added[None, :]
                ds += (sums[None, :] - later) * gate * (1.0 - gate)
            else:
                w, ds, dt = weigh(
                    s, x, g, tilt, lse2[None, :], delta[None, :], total[None, :], peak[None, :], mass[None, :],
                    count[None, :], sums[None, :], power, offset, KIND, POWER,
                )
                if LENGTH:
                    ds *= stretch[None, :]
                if KIND == "parallax":  # two logits of a pair: scaled products with q, products with r
                    ds *= scale
                    dk = tl.dot(dt.to(r.dtype), r, dk, input_precision=PRECISION)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
            dv = tl.dot(w.to(do.dtype), do, dv, input_precision=PRECISION)

    if KIND != "parallax":
        dk *= scale
    slice = batch.to(tl.int64) * keys * (heads // GROUP) + key_head
    store_tile(dk_ptr + slice * D, dk, column, keys, heads // GROUP * D, D, BLOCK_D, WIDE)
    store_tile(dv_ptr + slice * DV, dv, column, keys, heads // GROUP * DV, DV, BLOCK_DV, WIDE)
