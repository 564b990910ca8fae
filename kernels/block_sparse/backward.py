"""Backward kernels of block-sparse attention. No atomics: every gradient is summed by one program in a fixed order.

With P = exp(S - lse) and delta = rowsum(dO * O) - dlse, dS = P * (dO V^T - delta) (arXiv:2205.14135, appendix B.4).
`query_kernel` walks the lists for dQ and leaves delta behind, `key_kernel` walks the inverse lists for dK and dV. Both
take a log-sum-exp that is +inf, not -inf, where a query sees nothing: its weights are then zero.
"""

import triton
import triton.language as tl

from ..common.triton.extra import extra_end, extra_view, load_extra_pair
from ..common.triton.features import (
    hide_rows,
    load_vectors,
    products,
    row_products,
    scaled,
    store_vectors,
    zeros,
)
from ..common.triton.memory import elements, inside, offset
from ..common.triton.softmax import LOG2E, key_step, query_step
from ..neighborhood.tile import describe, load_tile, local, shift
from .forward import program, rows_of
from .tile import (
    box_count,
    hide_past_end,
    lengths_of,
    list_of,
    listed_keys,
    listed_queries,
    part_origin,
    view,
)


@triton.jit(do_not_specialize=["extra", "most"])
def query_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, out_ptr, out_strides, do_ptr, do_strides,
    lse_ptr, lse_strides, dlse_ptr, dlse_strides, delta_ptr, dq_ptr, dq_strides,
    num_ptr, idx_ptr, bias_ptr, q_len_ptr, kv_len_ptr, lists, most,
    extra_k_ptr, extra_k_strides, extra_v_ptr, extra_v_strides, extra_mask_ptr, extra_ends_ptr,
    q_lengths, k_lengths, heads, extra, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERY_BOX: tl.constexpr, KEY_BOX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EXTRA_KEYS: tl.constexpr, BIAS: tl.constexpr, Q_LEN: tl.constexpr, KV_LEN: tl.constexpr, EXTRA: tl.constexpr,
    EXTRA_MASK: tl.constexpr, TILE: tl.constexpr, DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """dQ, and delta for the other kernels. `delta` has the strides of lse, dQ those of out where values are as wide as
    keys: its own are then None. See `forward_kernel`."""
    if dq_strides is None:
        dq_strides = out_strides
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    out_strides, do_strides = elements(out_ptr, out_strides), elements(do_ptr, do_strides)
    lse_strides, dlse_strides = elements(lse_ptr, lse_strides), elements(dlse_ptr, dlse_strides)
    dq_strides = elements(dq_ptr, dq_strides)
    batch, head, box, boxes, place = program(tl.program_id(0), q_lengths, heads, QUERY_BOX, ROWS)
    if Q_LEN:
        q_len_ptr = lengths_of(q_len_ptr, batch, boxes, lists[3])
    if KV_LEN:
        kv_len_ptr = lengths_of(kv_len_ptr, batch, box_count(k_lengths, KEY_BOX), lists[4])
    row, keep, exists = rows_of(box, place, q_lengths, q_len_ptr, QUERY_BOX, Q_LEN)
    q_ptr, q_sp = view(q_ptr, q_strides, batch, head, WIDE)
    k_ptr, k_sp = view(k_ptr, k_strides, batch, head // GROUP, WIDE)
    v_ptr, v_sp = view(v_ptr, v_strides, batch, head // GROUP, WIDE)
    out_ptr, out_sp = view(out_ptr, out_strides, batch, head, WIDE)
    dq_ptr, dq_sp = view(dq_ptr, dq_strides, batch, head, WIDE)
    do_ptr, do_sp = view(do_ptr, do_strides, batch, head, WIDE)
    lse_ptr, lse_sp = view(lse_ptr, lse_strides, batch, head, WIDE)
    dlse_ptr, dlse_sp = view(dlse_ptr, dlse_strides, batch, head, WIDE)
    delta_ptr, _ = view(delta_ptr, lse_strides, batch, head, WIDE)
    q = load_vectors(q_ptr, offset(row, q_sp), q_strides[5], exists, D, BLOCK_D)
    do = load_vectors(do_ptr, offset(row, do_sp), do_strides[5], exists, DV, BLOCK_DV)
    out = load_vectors(out_ptr, offset(row, out_sp), 1, exists, DV, BLOCK_DV)
    lse2 = tl.load(lse_ptr + offset(row, lse_sp), mask=exists, other=float("inf")) * LOG2E
    delta = row_products(out, do)
    delta -= tl.load(dlse_ptr + offset(row, dlse_sp), mask=exists, other=0.0)
    tl.store(delta_ptr + offset(row, lse_sp), delta, mask=keep)

    entry = list_of(batch, head, boxes, lists) + box
    total = tl.load(num_ptr + entry) * (KEY_BOX[0] * KEY_BOX[1] * KEY_BOX[2])
    idx_ptr += entry * most
    if BIAS:
        bias_ptr += entry * most
    factor = scale * LOG2E
    dq = zeros(ROWS, BLOCK_D)
    if TILE is None:
        for c in tl.range(0, total, COLUMNS, num_stages=STAGES):
            column, see, bias = listed_keys(
                c, total, idx_ptr, bias_ptr, kv_len_ptr, k_lengths, KEY_BOX, COLUMNS, BIAS, KV_LEN
            )
            k = load_vectors(k_ptr, offset(column, k_sp), k_strides[5], see, D, BLOCK_D)
            v = load_vectors(v_ptr, offset(column, v_sp), v_strides[5], see, DV, BLOCK_DV)
            s = products(q, k, PRECISION) * factor
            s = tl.where(see[None, :], s + bias[None, :] if BIAS else s, float("-inf"))
            dq = query_step(dq, do, lse2, delta, s, k, v, 1.0, PRECISION)
    else:
        PARTS: tl.constexpr = (KEY_BOX[0] * KEY_BOX[1] * KEY_BOX[2]) // COLUMNS
        k_desc, v_desc = k_ptr, v_ptr
        if DESCRIPTOR:
            k_desc = describe(k_ptr, k_sp, k_lengths, D, TILE, BLOCK_D)
            v_desc = describe(v_ptr, v_sp, k_lengths, DV, TILE, BLOCK_DV)
        steps = local(TILE)
        for c in tl.range(0, total // COLUMNS, num_stages=STAGES):
            first = part_origin(tl.load(idx_ptr + c // PARTS), c % PARTS, k_lengths, KEY_BOX, TILE)
            k = load_tile(
                k_ptr, k_desc, first, steps, k_sp, k_strides[5], k_lengths, D, TILE, BLOCK_D, DESCRIPTOR, not EVEN
            )
            v = load_tile(
                v_ptr, v_desc, first, steps, v_sp, v_strides[5], k_lengths, DV, TILE, BLOCK_DV, DESCRIPTOR, not EVEN
            )
            s = products(q, k, PRECISION)
            s = hide_past_end(s, first, steps, k_lengths, TILE, EVEN)
            base = lse2
            if BIAS:
                base -= tl.load(bias_ptr + c // PARTS).to(tl.float32) * LOG2E
            dq = query_step(dq, do, base, delta, s, k, v, factor, PRECISION)
    if EXTRA:
        extra_k_ptr = extra_view(extra_k_ptr, extra_k_strides, batch, head // GROUP)
        extra_v_ptr = extra_view(extra_v_ptr, extra_v_strides, batch, head // GROUP)
        for e in tl.range(0, extra_end(extra_ends_ptr, batch, extra, EXTRA_MASK), EXTRA_KEYS):
            k, v, see = load_extra_pair(
                extra_k_ptr, extra_k_strides, extra_v_ptr, extra_v_strides, extra_mask_ptr, batch, e, extra,
                D, DV, EXTRA_KEYS, BLOCK_D, BLOCK_DV, EXTRA_MASK,
            )
            s = products(q, k, PRECISION) * factor
            s = tl.where(see[None, :], s, float("-inf"))
            dq = query_step(dq, do, lse2, delta, s, k, v, 1.0, PRECISION)

    store_vectors(dq_ptr, offset(row, dq_sp), scaled(dq, scale), keep, D, BLOCK_D)


@triton.jit(do_not_specialize=["most"])
def key_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, do_ptr, do_strides,
    lse_ptr, lse_strides, delta_ptr, dk_ptr, dk_strides, dv_ptr, dv_strides,
    starts_ptr, order_ptr, bias_ptr, q_len_ptr, kv_len_ptr, lists, most,
    q_lengths, k_lengths, key_heads, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERY_BOX: tl.constexpr, KEY_BOX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BIAS: tl.constexpr, Q_LEN: tl.constexpr, KV_LEN: tl.constexpr,
    TILE: tl.constexpr, DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """dK and dV of a tile of the keys of a block, over the queries that list it, of every query head that shares the
    key head. Rows are keys and columns queries: tiles are computed transposed. The strides of dV are None where they
    are those of dK."""
    if dv_strides is None:
        dv_strides = dk_strides
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    do_strides, lse_strides = elements(do_ptr, do_strides), elements(lse_ptr, lse_strides)
    dk_strides, dv_strides = elements(dk_ptr, dk_strides), elements(dv_ptr, dv_strides)
    batch, key_head, box, boxes, place = program(tl.program_id(0), k_lengths, key_heads, KEY_BOX, ROWS)
    if Q_LEN:
        q_len_ptr = lengths_of(q_len_ptr, batch, box_count(q_lengths, QUERY_BOX), lists[3])
    if KV_LEN:
        kv_len_ptr = lengths_of(kv_len_ptr, batch, boxes, lists[4])
    row, keep, exists = rows_of(box, place, k_lengths, kv_len_ptr, KEY_BOX, KV_LEN)
    k_ptr, k_sp = view(k_ptr, k_strides, batch, key_head, WIDE)
    v_ptr, v_sp = view(v_ptr, v_strides, batch, key_head, WIDE)
    k = load_vectors(k_ptr, offset(row, k_sp), k_strides[5], exists, D, BLOCK_D)
    v = load_vectors(v_ptr, offset(row, v_sp), v_strides[5], exists, DV, BLOCK_DV)
    entries = box_count(q_lengths, QUERY_BOX) * most
    factor = scale * LOG2E

    dk = zeros(ROWS, BLOCK_D)
    dv = zeros(ROWS, BLOCK_DV)
    for g in range(GROUP):
        head = key_head * GROUP + g
        head_q, q_sp = view(q_ptr, q_strides, batch, head, WIDE)
        head_do, do_sp = view(do_ptr, do_strides, batch, head, WIDE)
        head_lse, lse_sp = view(lse_ptr, lse_strides, batch, head, WIDE)
        head_delta, _ = view(delta_ptr, lse_strides, batch, head, WIDE)
        starts = starts_ptr + list_of(batch, head, boxes + 1, lists) + box
        first = tl.load(starts)
        total = (tl.load(starts + 1) - first) * (QUERY_BOX[0] * QUERY_BOX[1] * QUERY_BOX[2])
        row_of_lists = list_of(batch, head, entries, lists)
        head_bias = bias_ptr
        if BIAS:
            head_bias = bias_ptr + row_of_lists
        if TILE is None:
            for c in tl.range(0, total, COLUMNS, num_stages=STAGES):
                column, see, bias = listed_queries(
                    c, total, order_ptr + row_of_lists + first, head_bias, q_len_ptr, q_lengths, most,
                    QUERY_BOX, COLUMNS, BIAS, Q_LEN,
                )
                q = load_vectors(head_q, offset(column, q_sp), q_strides[5], see, D, BLOCK_D)
                do = load_vectors(head_do, offset(column, do_sp), do_strides[5], see, DV, BLOCK_DV)
                lse2 = tl.load(head_lse + offset(column, lse_sp), mask=see, other=float("inf")) * LOG2E
                delta = tl.load(head_delta + offset(column, lse_sp), mask=see, other=0.0)
                st = products(k, q, PRECISION) * factor
                if BIAS:
                    st += bias[None, :]
                dk, dv = key_step(dk, dv, q, do, lse2, delta, st, v, 1.0, PRECISION)
        else:
            PARTS: tl.constexpr = (QUERY_BOX[0] * QUERY_BOX[1] * QUERY_BOX[2]) // COLUMNS
            q_desc, do_desc = head_q, head_do
            if DESCRIPTOR:
                q_desc = describe(head_q, q_sp, q_lengths, D, TILE, BLOCK_D)
                do_desc = describe(head_do, do_sp, q_lengths, DV, TILE, BLOCK_DV)
            steps = local(TILE)
            rows = offset(steps, lse_sp)
            for c in tl.range(0, total // COLUMNS, num_stages=STAGES):
                named = tl.load(order_ptr + row_of_lists + first + c // PARTS)
                corner = part_origin(named // most, c % PARTS, q_lengths, QUERY_BOX, TILE)
                q = load_tile(
                    head_q, q_desc, corner, steps, q_sp, q_strides[5], q_lengths, D, TILE, BLOCK_D,
                    DESCRIPTOR, not EVEN,
                )
                do = load_tile(
                    head_do, do_desc, corner, steps, do_sp, do_strides[5], q_lengths, DV, TILE, BLOCK_DV,
                    DESCRIPTOR, not EVEN,
                )
                where = offset(corner, lse_sp) + rows
                if EVEN:
                    lse2, delta = tl.load(head_lse + where) * LOG2E, tl.load(head_delta + where)
                else:  # a query past the end has weights of zero
                    see = inside(shift(corner, steps), q_lengths)
                    lse2 = tl.load(head_lse + where, mask=see, other=float("inf")) * LOG2E
                    delta = tl.load(head_delta + where, mask=see, other=0.0)
                if BIAS:
                    lse2 -= tl.load(head_bias + named).to(tl.float32) * LOG2E
                st = products(k, q, PRECISION)
                dk, dv = key_step(dk, dv, q, do, lse2, delta, st, v, factor, PRECISION)

    dk_ptr, dk_sp = view(dk_ptr, dk_strides, batch, key_head, WIDE)
    dv_ptr, dv_sp = view(dv_ptr, dv_strides, batch, key_head, WIDE)
    store_vectors(dk_ptr, offset(row, dk_sp), hide_rows(scaled(dk, scale), exists), keep, D, BLOCK_D)
    store_vectors(dv_ptr, offset(row, dv_sp), hide_rows(dv, exists), keep, DV, BLOCK_DV)
