"""Backward kernels of neighborhood attention. No atomics: every gradient is summed by one program in a fixed order.

With P = exp(S - lse) and delta = rowsum(dO * O) - dlse, dS = P * (dO V^T - delta) (arXiv:2205.14135, appendix B.4).
`query_kernel` walks the windows for dQ and leaves delta behind, `key_kernel` walks the inverse windows for dK and dV.
For the gradient of a relative position table `query_kernel` also leaves dS of every visible pair, and `table_kernel`
sums it. A query sees at most as many consecutive keys on an axis as its window is long, so the position of a key modulo
the window tells the pairs of a query apart.
The latter computes transposed tiles directly: some Triton releases miscompile the transpose of an MMA result on Hopper.
"""

import triton
import triton.language as tl

from ..common.triton.extra import extra_end, extra_view, load_extra_pair
from ..common.triton.features import (
    add_weighted,
    hide_rows,
    load_vectors,
    products,
    row_products,
    scaled,
    store_vectors,
    zeros,
)
from ..common.triton.memory import elements, inside, offset
from ..common.triton.softmax import LOG2E, key_step, logit_gradient, query_step
from .forward import logits_tile
from .tile import (
    below,
    describe,
    grids,
    group_view,
    integers,
    load_tile,
    local,
    part,
    program,
    row_bounds,
    row_strides,
    shift,
    spans,
    tile_count,
    tile_origin,
    visible,
)


@triton.jit
def program_pairs(pairs_ptr, ROWS: tl.constexpr, WINDOW: tl.constexpr):
    """The pairs of this program, of `[programs, ROWS, keys of a window]`."""
    return pairs_ptr + tl.program_id(0).to(tl.int64) * (ROWS * WINDOW[0] * WINDOW[1] * WINDOW[2])


@triton.jit
def store_pairs(
    pairs_ptr, ds, corner, steps, lo, count,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):
    """Store dS of the visible pairs of a tile whose keys begin at `corner` and go on by `steps`."""
    key = shift(corner, steps)
    row = tl.arange(0, QUERIES[0] * QUERIES[1] * QUERIES[2]) * (WINDOW[0] * WINDOW[1] * WINDOW[2])
    slot = (key[0] % WINDOW[0] * WINDOW[1] + key[1] % WINDOW[1]) * WINDOW[2] + key[2] % WINDOW[2]
    place = pairs_ptr + row[:, None] + slot[None, :]
    if MASKED:
        tl.store(place, ds, mask=visible(key, lo, count, QUERIES, KEYS))
    else:
        tl.store(place, ds)


@triton.jit(do_not_specialize=["extra", "skip"])
def query_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, out_ptr, out_strides, do_ptr, do_strides,
    lse_ptr, dlse_ptr, delta_ptr, dq_ptr, dq_strides,
    bias_ptr, pairs_ptr, extra_k_ptr, extra_k_strides, extra_v_ptr, extra_v_strides, extra_mask_ptr, extra_ends_ptr,
    lengths, start, counts, skip, heads, extra, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, EXTRA_KEYS: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr,
    BIAS: tl.constexpr, TABLE: tl.constexpr, DBIAS: tl.constexpr,
    EXTRA: tl.constexpr, EXTRA_MASK: tl.constexpr, PART: tl.constexpr,
    INNER: tl.constexpr, BORDER: tl.constexpr, DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """dQ, and delta for the other kernels. dQ has the strides of out unless others are given; lse, its gradient and
    delta are contiguous; see `forward_kernel`.

    With `DBIAS` a program also leaves dS of its visible pairs in `pairs_ptr`, `[programs, queries, keys of a window]`.
    Such a launch may be one of several; `skip` programs belong to those before."""
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    out_strides, do_strides = elements(out_ptr, out_strides), elements(do_ptr, do_strides)
    lengths, start, counts = grids(lengths, start, counts, PART)
    pid = tl.program_id(0)
    if DBIAS:
        pid += skip
    batch, head, group, n, first = program(pid, counts, heads, QUERIES, DILATION, CAUSAL)
    n, begin, nq, origin = part(group, n, lengths, start, counts, DILATION, PART)
    if (first[0] >= nq[0]) | (first[1] >= nq[1]) | (first[2] >= nq[2]):
        return
    q_ptr, q_sp = group_view(q_ptr, q_strides, batch, head, origin, DILATION, WIDE)
    k_ptr, k_sp = group_view(k_ptr, k_strides, batch, head // GROUP, group, DILATION, WIDE)
    v_ptr, v_sp = group_view(v_ptr, v_strides, batch, head // GROUP, group, DILATION, WIDE)
    out_ptr, out_sp = group_view(out_ptr, out_strides, batch, head, origin, DILATION, WIDE)
    if dq_strides is None:
        dq_strides = out_strides
    else:
        dq_strides = elements(dq_ptr, dq_strides)
    dq_ptr, dq_sp = group_view(dq_ptr, dq_strides, batch, head, origin, DILATION, WIDE)
    do_ptr, do_sp = group_view(do_ptr, do_strides, batch, head, origin, DILATION, WIDE)
    lse_ptr, lse_sp = group_view(lse_ptr, row_strides(counts, heads), batch, head, origin, DILATION, WIDE)
    dlse_ptr, _ = group_view(dlse_ptr, row_strides(counts, heads), batch, head, origin, DILATION, WIDE)
    delta_ptr, _ = group_view(delta_ptr, row_strides(counts, heads), batch, head, origin, DILATION, WIDE)
    k_desc, v_desc = k_ptr, v_ptr
    if DESCRIPTOR:
        k_desc = describe(k_ptr, k_sp, n, D, KEYS, BLOCK_D)
        v_desc = describe(v_ptr, v_sp, n, DV, KEYS, BLOCK_DV)

    q_steps, k_steps = local(QUERIES), local(KEYS)
    row = shift(first, q_steps)
    keep = inside(row, nq)
    q = load_tile(q_ptr, q_ptr, first, q_steps, q_sp, q_strides[5], nq, D, QUERIES, BLOCK_D, False, True)
    do = load_tile(do_ptr, do_ptr, first, q_steps, do_sp, do_strides[5], nq, DV, QUERIES, BLOCK_DV, False, True)
    out = load_tile(out_ptr, out_ptr, first, q_steps, out_sp, 1, nq, DV, QUERIES, BLOCK_DV, False, True)
    lse2 = tl.load(lse_ptr + offset(row, lse_sp), mask=keep, other=float("inf")) * LOG2E
    delta = row_products(out, do)
    delta -= tl.load(dlse_ptr + offset(row, lse_sp), mask=keep, other=0.0)
    tl.store(delta_ptr + offset(row, lse_sp), delta, mask=keep)

    position = shift(row, begin)
    lo, count = row_bounds(row, n, begin, nq, WINDOW, STRIDE, CAUSAL, False, PART)
    BIAS_STRIDES: tl.constexpr = (TABLE[1] * TABLE[2], TABLE[2], 1)
    bias_row = row[0]
    factor = scale * LOG2E
    if BIAS:
        bias_ptr += head * TABLE[0] * BIAS_STRIDES[0]
        bias_row = offset(
            (TABLE[0] // 2 - position[0], TABLE[1] // 2 - position[1], TABLE[2] // 2 - position[2]), BIAS_STRIDES
        )
        factor = LOG2E
    ROWS: tl.constexpr = QUERIES[0] * QUERIES[1] * QUERIES[2]
    if DBIAS:
        pairs_ptr = program_pairs(pairs_ptr, ROWS, WINDOW)

    starts, visits, inner, inner_visits = spans(
        first, n, begin, nq, QUERIES, KEYS, WINDOW, STRIDE, CAUSAL, False, PART
    )

    dq = zeros(ROWS, BLOCK_D)
    for MASKED in tl.static_range(1 - INNER, 1 + BORDER):
        for t in tl.range(0, tile_count(visits, inner_visits, MASKED), num_stages=STAGES):
            corner = tile_origin(t, starts, visits, inner, inner_visits, KEYS, MASKED, INNER)
            k = load_tile(k_ptr, k_desc, corner, k_steps, k_sp, k_strides[5], n, D, KEYS, BLOCK_D, DESCRIPTOR, MASKED)
            v = load_tile(
                v_ptr, v_desc, corner, k_steps, v_sp, v_strides[5], n, DV, KEYS, BLOCK_DV, DESCRIPTOR, MASKED
            )
            s = logits_tile(
                q, k, corner, k_steps, lo, count, bias_ptr, bias_row, scale,
                QUERIES, KEYS, BIAS, BIAS_STRIDES, MASKED, PRECISION,
            )
            ds = logit_gradient(do, lse2, delta, s, v, factor, PRECISION)
            if DBIAS:
                store_pairs(pairs_ptr, ds, corner, k_steps, lo, count, QUERIES, KEYS, WINDOW, MASKED)
            dq = add_weighted(dq, ds, k, PRECISION)
    if EXTRA:
        extra_k_ptr = extra_view(extra_k_ptr, extra_k_strides, batch, head // GROUP)
        extra_v_ptr = extra_view(extra_v_ptr, extra_v_strides, batch, head // GROUP)
        for e in tl.range(0, extra_end(extra_ends_ptr, batch, extra, EXTRA_MASK), EXTRA_KEYS):
            k, v, see = load_extra_pair(
                extra_k_ptr, extra_k_strides, extra_v_ptr, extra_v_strides, extra_mask_ptr, batch, e, extra,
                D, DV, EXTRA_KEYS, BLOCK_D, BLOCK_DV, EXTRA_MASK,
            )
            s = products(q, k, PRECISION)
            s = tl.where(see[None, :], s * (scale * LOG2E), float("-inf"))
            dq = query_step(dq, do, lse2, delta, s, k, v, 1.0, PRECISION)

    store_vectors(dq_ptr, offset(row, dq_sp), scaled(dq, scale), keep, D, BLOCK_D)


@triton.jit
def _range(step, count, keep, WINDOW: tl.constexpr):
    """Smallest range of steps on one axis that holds the `count` steps from `step` on of all queries of `keep`."""
    return tl.min(tl.where(keep, step, WINDOW), 0), tl.max(tl.where(keep, step + count, -WINDOW), 0)


@triton.jit(do_not_specialize=["skip"])
def table_kernel(
    pairs_ptr, partial_ptr, lengths, start, counts, skip, heads,
    QUERIES: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr,
    PART: tl.constexpr, ENTRIES: tl.constexpr,
):
    """Sums `[programs, table]` of the pairs of a tile of queries by table entry, that is by the step from query to key.

    Entries of no pair are left as they are. Programs and pairs are those of `query_kernel`; `ENTRIES` of the last two
    axes are summed at a time.
    """
    lengths, start, counts = grids(lengths, start, counts, PART)
    _, _, group, n, first = program(tl.program_id(0) + skip, counts, heads, QUERIES, DILATION, CAUSAL)
    n, begin, nq, _ = part(group, n, lengths, start, counts, DILATION, PART)
    if (first[0] >= nq[0]) | (first[1] >= nq[1]) | (first[2] >= nq[2]):
        return
    ROWS: tl.constexpr = QUERIES[0] * QUERIES[1] * QUERIES[2]
    TABLE: tl.constexpr = ((2 * WINDOW[1] - 1) * (2 * WINDOW[2] - 1), 2 * WINDOW[2] - 1, 1)
    pairs_ptr = program_pairs(pairs_ptr, ROWS, WINDOW)
    partial_ptr += tl.program_id(0).to(tl.int64) * ((2 * WINDOW[0] - 1) * TABLE[0])
    partial_ptr += offset((WINDOW[0] - 1, WINDOW[1] - 1, WINDOW[2] - 1), TABLE)

    # steps from a query to the first key that it sees, and the range of the steps of all queries
    row = shift(first, local(QUERIES))
    keep = inside(row, nq)
    position = shift(row, begin)
    lo, count = row_bounds(row, n, begin, nq, WINDOW, STRIDE, CAUSAL, False, PART)
    step_x, step_y, step_z = lo[0] - position[0], lo[1] - position[1], lo[2] - position[2]
    first_x, end_x = _range(step_x, count[0], keep, WINDOW[0])
    first_y, end_y = _range(step_y, count[1], keep, WINDOW[1])
    first_z, end_z = _range(step_z, count[2], keep, WINDOW[2])

    # sums over queries of `[queries, entries on y, entries on z]`
    pairs_row = tl.arange(0, ROWS) * (WINDOW[0] * WINDOW[1] * WINDOW[2])
    for x in range(first_x, end_x):
        see_x = keep & below(x - step_x, count[0])
        place_x = pairs_row + (position[0] + x) % WINDOW[0] * (WINDOW[1] * WINDOW[2])
        for y_entry in range(first_y, end_y, ENTRIES[0]):
            y = y_entry + tl.arange(0, ENTRIES[0])
            see_y = see_x[:, None] & below(y[None, :] - step_y[:, None], count[1][:, None])
            place_y = place_x[:, None] + (position[1][:, None] + y[None, :]) % WINDOW[1] * WINDOW[2]
            for z_entry in range(first_z, end_z, ENTRIES[1]):
                z = z_entry + tl.arange(0, ENTRIES[1])
                see_z = below(z[None, :] - step_z[:, None], count[2][:, None])
                place_z = (position[2][:, None] + z[None, :]) % WINDOW[2]
                place = pairs_ptr + place_y[:, :, None] + place_z[:, None, :]
                pairs = tl.load(place, mask=see_y[:, :, None] & see_z[:, None, :], other=0.0)
                to = partial_ptr + x * TABLE[0] + (y * TABLE[1])[:, None] + z[None, :]
                tl.store(to, tl.sum(pairs, 0), mask=(y < WINDOW[1])[:, None] & (z < WINDOW[2])[None, :])


@triton.jit
def key_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, do_ptr, do_strides,
    lse_ptr, delta_ptr, dk_ptr, dv_ptr, dk_strides, dv_strides, bias_ptr,
    lengths, start, counts, key_heads, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr,
    BIAS: tl.constexpr, TABLE: tl.constexpr, PART: tl.constexpr,
    INNER: tl.constexpr, BORDER: tl.constexpr, DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """dK and dV of a tile of keys, over the queries that see it, of every query head that shares the key head. dV has
    the strides of dK unless others are given."""
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    do_strides = elements(do_ptr, do_strides)
    lengths, start, counts = grids(lengths, start, counts, PART)
    batch, key_head, group, n, first = program(tl.program_id(0), lengths, key_heads, KEYS, DILATION, (False,) * 3)
    if (first[0] >= n[0]) | (first[1] >= n[1]) | (first[2] >= n[2]):
        return
    n, begin, nq, origin = part(group, n, lengths, start, counts, DILATION, PART)
    lse_strides = row_strides(counts, key_heads * GROUP)
    k_ptr, k_sp = group_view(k_ptr, k_strides, batch, key_head, group, DILATION, WIDE)
    v_ptr, v_sp = group_view(v_ptr, v_strides, batch, key_head, group, DILATION, WIDE)
    k_steps, q_steps = local(KEYS), local(QUERIES)
    row = shift(first, k_steps)
    k = load_tile(k_ptr, k_ptr, first, k_steps, k_sp, k_strides[5], n, D, KEYS, BLOCK_D, False, True)
    v = load_tile(v_ptr, v_ptr, first, k_steps, v_sp, v_strides[5], n, DV, KEYS, BLOCK_DV, False, True)

    lo, count = row_bounds(row, n, begin, nq, WINDOW, STRIDE, CAUSAL, True, PART)
    TABLE_STRIDES: tl.constexpr = (TABLE[1] * TABLE[2], TABLE[2], 1)
    BIAS_STRIDES: tl.constexpr = (-TABLE[1] * TABLE[2], -TABLE[2], -1)
    bias_row = row[0]
    factor = scale * LOG2E
    if BIAS:
        bias_row = offset((TABLE[0] // 2 + row[0], TABLE[1] // 2 + row[1], TABLE[2] // 2 + row[2]), TABLE_STRIDES)
        if PART:
            bias_row -= offset(begin, TABLE_STRIDES)
        factor = LOG2E

    starts, visits, inner, inner_visits = spans(first, n, begin, nq, KEYS, QUERIES, WINDOW, STRIDE, CAUSAL, True, PART)

    dk = zeros(KEYS[0] * KEYS[1] * KEYS[2], BLOCK_D)
    dv = zeros(KEYS[0] * KEYS[1] * KEYS[2], BLOCK_DV)
    for g in range(GROUP):
        head = key_head * GROUP + g
        head_q, q_sp = group_view(q_ptr, q_strides, batch, head, origin, DILATION, WIDE)
        head_do, do_sp = group_view(do_ptr, do_strides, batch, head, origin, DILATION, WIDE)
        head_lse, lse_sp = group_view(lse_ptr, lse_strides, batch, head, origin, DILATION, WIDE)
        head_delta, _ = group_view(delta_ptr, lse_strides, batch, head, origin, DILATION, WIDE)
        head_bias = bias_ptr
        if BIAS:
            head_bias = bias_ptr + head * TABLE[0] * TABLE_STRIDES[0]
        q_desc, do_desc = head_q, head_do
        if DESCRIPTOR:
            q_desc = describe(head_q, q_sp, nq, D, QUERIES, BLOCK_D)
            do_desc = describe(head_do, do_sp, nq, DV, QUERIES, BLOCK_DV)
        for MASKED in tl.static_range(1 - INNER, 1 + BORDER):
            for t in tl.range(0, tile_count(visits, inner_visits, MASKED), num_stages=STAGES):
                corner = tile_origin(t, starts, visits, inner, inner_visits, QUERIES, MASKED, INNER)
                column = shift(corner, q_steps)
                q = load_tile(
                    head_q, q_desc, corner, q_steps, q_sp, q_strides[5], nq, D, QUERIES, BLOCK_D, DESCRIPTOR, MASKED
                )
                do = load_tile(
                    head_do, do_desc, corner, q_steps, do_sp, do_strides[5], nq, DV, QUERIES, BLOCK_DV, DESCRIPTOR,
                    MASKED,
                )
                place = offset(column, lse_sp)
                if MASKED:
                    keep = inside(column, nq)
                    lse2 = tl.load(head_lse + place, mask=keep, other=float("inf")) * LOG2E
                    delta = tl.load(head_delta + place, mask=keep, other=0.0)
                else:
                    lse2 = tl.load(head_lse + place) * LOG2E
                    delta = tl.load(head_delta + place)
                st = logits_tile(
                    k, q, corner, q_steps, lo, count, head_bias, bias_row, scale,
                    KEYS, QUERIES, BIAS, BIAS_STRIDES, MASKED, PRECISION,
                )
                dk, dv = key_step(dk, dv, q, do, lse2, delta, st, v, factor, PRECISION)

    keep = inside(row, n)
    dk_strides = elements(dk_ptr, dk_strides)
    value_strides = dk_strides if dv_strides is None else elements(dv_ptr, dv_strides)
    dk_ptr, dk_sp = group_view(dk_ptr, dk_strides, batch, key_head, group, DILATION, WIDE)
    dv_ptr, dv_sp = group_view(dv_ptr, value_strides, batch, key_head, group, DILATION, WIDE)
    store_vectors(dk_ptr, offset(row, dk_sp), scaled(dk, scale), keep, D, BLOCK_D)
    store_vectors(dv_ptr, offset(row, dv_sp), dv, keep, DV, BLOCK_DV)


@triton.jit
def token(t, lengths):
    """Grid coordinates of flat tokens."""
    return t // lengths[2] // lengths[1], t // lengths[2] % lengths[1], t % lengths[2]


@triton.jit(do_not_specialize=["extra"])
def extra_kernel(
    q_ptr, q_strides, do_ptr, do_strides, lse_ptr, delta_ptr,
    extra_k_ptr, extra_k_strides, extra_v_ptr, extra_v_strides, extra_mask_ptr, extra_ends_ptr, dk_ptr, dv_ptr,
    lengths, batches, key_heads, extra, chunk, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERIES: tl.constexpr, EXTRA_KEYS: tl.constexpr, EXTRA_MASK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """Partial gradients (float32) of the extra keys `[chunks, B, extra, key heads, D]` and values `[…, DV]`; those of
    masked tokens are zero.

    A token that is not masked is seen by every query, so a program takes a block of extra keys and one chunk of all
    queries.
    """
    q_strides, do_strides = elements(q_ptr, q_strides), elements(do_ptr, do_strides)
    blocks = tl.cdiv(extra, EXTRA_KEYS)
    pid = tl.program_id(0)
    first = pid % blocks * EXTRA_KEYS
    key_head = pid // blocks % key_heads
    batch = pid // blocks // key_heads % batches
    part = pid // blocks // key_heads // batches
    lengths = integers(lengths)
    tokens = lengths[0] * lengths[1] * lengths[2]

    extra_k_ptr = extra_view(extra_k_ptr, extra_k_strides, batch, key_head)
    extra_v_ptr = extra_view(extra_v_ptr, extra_v_strides, batch, key_head)
    k, v, see = load_extra_pair(
        extra_k_ptr, extra_k_strides, extra_v_ptr, extra_v_strides, extra_mask_ptr, batch, first, extra,
        D, DV, EXTRA_KEYS, BLOCK_D, BLOCK_DV, EXTRA_MASK,
    )
    dk, dv = zeros(EXTRA_KEYS, BLOCK_D), zeros(EXTRA_KEYS, BLOCK_DV)
    for g in range(GROUP):
        head = key_head * GROUP + g
        end = tl.minimum(part * chunk + chunk, tokens)
        if EXTRA_MASK:  # no queries for a block that nobody sees
            end = tl.where(first < extra_end(extra_ends_ptr, batch, extra, EXTRA_MASK), end, 0)
        for begin in tl.range(part * chunk, end, QUERIES, num_stages=STAGES):
            t = begin + tl.arange(0, QUERIES)
            keep = t < end
            query = token(t, lengths)
            q = load_vectors(q_ptr, row_offset(q_strides, batch, query, head), q_strides[5], keep, D, BLOCK_D)
            do = load_vectors(do_ptr, row_offset(do_strides, batch, query, head), do_strides[5], keep, DV, BLOCK_DV)
            place = row_offset(row_strides(lengths, key_heads * GROUP), batch, query, head)
            lse2 = tl.load(lse_ptr + place, mask=keep, other=float("inf")) * LOG2E
            delta = tl.load(delta_ptr + place, mask=keep, other=0.0)
            st = products(k, q, PRECISION)
            dk, dv = key_step(dk, dv, q, do, lse2, delta, st, v, scale * LOG2E, PRECISION)

    e = first + tl.arange(0, EXTRA_KEYS)
    base = (part.to(tl.int64) * batches + batch) * extra
    row = (base + e) * key_heads + key_head
    if EXTRA_MASK:
        dk, dv = hide_rows(dk, see), hide_rows(dv, see)
    store_vectors(dk_ptr, row * D, scaled(dk, scale), e < extra, D, BLOCK_D)
    store_vectors(dv_ptr, row * DV, dv, e < extra, DV, BLOCK_DV)


@triton.jit
def row_offset(strides, batch, position, head):
    """Element offsets of tokens, 64 bits; `strides` of `[B, X, Y, Z, heads, …]`."""
    where = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[4]
    where += position[0].to(tl.int64) * strides[1]
    return where + position[1].to(tl.int64) * strides[2] + position[2].to(tl.int64) * strides[3]
