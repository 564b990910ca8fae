"""Forward kernel of neighborhood attention: one program computes a tile of queries of one dilation group and head."""

import triton
import triton.language as tl

from ..common.triton.extra import extra_end, extra_view, load_extra_pair
from ..common.triton.features import products, scale_rows, store_vectors, zeros
from ..common.triton.memory import elements, inside, offset
from ..common.triton.softmax import LN2, LOG2E, softmax_step
from .tile import (
    describe,
    grids,
    group_view,
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
def logits_tile(
    rows, columns, corner, steps, lo, count, bias_ptr, bias_row, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr, BIAS_STRIDES: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Logits `[rows, columns]` of a tile, -inf where a row does not see a column; scaled only if there is a bias.

    The columns begin at `corner` and go on by `steps`. `bias_row` holds, for every row, the table entry of column zero;
    `BIAS_STRIDES` steps the table along the columns. The table is wide enough for columns that a row does not see.
    """
    s = products(rows, columns, PRECISION)
    if BIAS:  # one address a row: what steps add is known when compiling, and part of the load
        entry = bias_ptr + (bias_row + offset(corner, BIAS_STRIDES))[:, None] + offset(steps, BIAS_STRIDES)[None, :]
    if MASKED:
        see = visible(shift(corner, steps), lo, count, ROWS, COLUMNS)
        if BIAS:
            s = s * scale + tl.load(entry).to(tl.float32)
        s = tl.where(see, s, float("-inf"))
    elif BIAS:
        s = s * scale + tl.load(entry).to(tl.float32)
    return s


@triton.jit(do_not_specialize=["extra"])  # a loop known to run once is scheduled into the rest, and spills
def forward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, out_ptr, out_strides, lse_ptr,
    factor_ptr, bias_ptr, extra_k_ptr, extra_k_strides, extra_v_ptr, extra_v_strides, extra_mask_ptr, extra_ends_ptr,
    lengths, start, counts, heads, extra, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, EXTRA_KEYS: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr,
    QUANTIZED: tl.constexpr, BIAS: tl.constexpr, TABLE: tl.constexpr, EXTRA: tl.constexpr, EXTRA_MASK: tl.constexpr,
    PART: tl.constexpr, INNER: tl.constexpr, BORDER: tl.constexpr, DESCRIPTOR: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """Strides are of `[B, X, Y, Z, heads, head_dim]` (extra: `[B, tokens, heads, head_dim]`); values and output have
    `DV` features a head, queries and keys `D`. `GROUP` query heads share a key head, `TABLE` is the size of the widened
    bias table of a head, and `INNER`/`BORDER` say whether any key tile is wholly seen / not wholly seen. With `PART`
    the queries are the box of `counts` tokens from `start` on.
    Causal axes are walked from their end: the last queries have the most keys, and what takes long must not begin last.
    With `EXTRA_MASK` extra keys are visible where the mask `[B, extra]` is not 0, up to an end for each batch entry.
    `QUANTIZED` query and keys have another scale for each batch entry and head: `scale` times that of `[B, heads]`.
    """
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    out_strides = elements(out_ptr, out_strides)
    lengths, start, counts = grids(lengths, start, counts, PART)
    batch, head, group, n, first = program(tl.program_id(0), counts, heads, QUERIES, DILATION, CAUSAL)
    n, begin, nq, origin = part(group, n, lengths, start, counts, DILATION, PART)
    if (first[0] >= nq[0]) | (first[1] >= nq[1]) | (first[2] >= nq[2]):
        return
    q_ptr, q_sp = group_view(q_ptr, q_strides, batch, head, origin, DILATION, WIDE)
    k_ptr, k_sp = group_view(k_ptr, k_strides, batch, head // GROUP, group, DILATION, WIDE)
    v_ptr, v_sp = group_view(v_ptr, v_strides, batch, head // GROUP, group, DILATION, WIDE)
    k_desc, v_desc = k_ptr, v_ptr
    if DESCRIPTOR:
        k_desc = describe(k_ptr, k_sp, n, D, KEYS, BLOCK_D)
        v_desc = describe(v_ptr, v_sp, n, DV, KEYS, BLOCK_DV)

    if QUANTIZED:
        scale *= tl.load(factor_ptr + batch * heads + head)
    q_steps, k_steps = local(QUERIES), local(KEYS)
    row = shift(first, q_steps)
    q = load_tile(q_ptr, q_ptr, first, q_steps, q_sp, q_strides[5], nq, D, QUERIES, BLOCK_D, False, True)
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

    starts, visits, inner, inner_visits = spans(
        first, n, begin, nq, QUERIES, KEYS, WINDOW, STRIDE, CAUSAL, False, PART
    )

    acc = zeros(QUERIES[0] * QUERIES[1] * QUERIES[2], BLOCK_DV)
    m = tl.full([QUERIES[0] * QUERIES[1] * QUERIES[2]], float("-inf"), tl.float32)
    l = tl.zeros([QUERIES[0] * QUERIES[1] * QUERIES[2]], tl.float32)

    for MASKED in tl.static_range(1 - INNER, 1 + BORDER):
        for t in tl.range(0, tile_count(visits, inner_visits, MASKED), num_stages=STAGES):
            corner = tile_origin(t, starts, visits, inner, inner_visits, KEYS, MASKED, INNER)
            k = load_tile(k_ptr, k_desc, corner, k_steps, k_sp, k_strides[5], n, D, KEYS, BLOCK_D, DESCRIPTOR, MASKED)
            s = logits_tile(
                q, k, corner, k_steps, lo, count, bias_ptr, bias_row, scale,
                QUERIES, KEYS, BIAS, BIAS_STRIDES, MASKED, PRECISION,
            )
            v = load_tile(
                v_ptr, v_desc, corner, k_steps, v_sp, v_strides[5], n, DV, KEYS, BLOCK_DV, DESCRIPTOR, MASKED
            )
            acc, m, l = softmax_step(acc, m, l, s, v, factor, PRECISION)
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
            acc, m, l = softmax_step(acc, m, l, s, v, 1.0, PRECISION)

    keep = inside(row, nq)
    out_ptr, out_sp = group_view(out_ptr, out_strides, batch, head, origin, DILATION, WIDE)
    lse_ptr, lse_sp = group_view(lse_ptr, row_strides(counts, heads), batch, head, origin, DILATION, WIDE)
    store_vectors(out_ptr, offset(row, out_sp), scale_rows(acc, 1.0 / l), keep, DV, BLOCK_DV)
    tl.store(lse_ptr + offset(row, lse_sp), (m + tl.log2(l)) * LN2, mask=keep)
