"""Forward kernel of block-sparse attention: one program computes a tile of the queries of one block and head."""

import triton
import triton.language as tl

from ..common.triton.extra import extra_end, extra_view, load_extra_pair
from ..common.triton.features import hide_rows, load_vectors, products, scale_rows, store_vectors, zeros
from ..common.triton.memory import elements, inside, offset
from ..common.triton.softmax import LN2, LOG2E, softmax_step
from ..neighborhood.tile import describe, load_tile, local
from .tile import (
    box_count,
    hide_past_end,
    lengths_of,
    list_of,
    listed_keys,
    listed_scales,
    part_origin,
    position,
    view,
)


@triton.jit
def program(pid, lengths, heads, BOX: tl.constexpr, ROWS: tl.constexpr):
    """Batch, head, block, number of blocks, and tokens in the block, of program `pid`. Tiles vary fastest."""
    TILES: tl.constexpr = (BOX[0] * BOX[1] * BOX[2] + ROWS - 1) // ROWS
    boxes = box_count(lengths, BOX)
    place = pid % TILES * ROWS + tl.arange(0, ROWS)
    box = pid // TILES % boxes
    rest = pid // TILES // boxes
    return rest // heads, rest % heads, box, boxes, place


@triton.jit
def rows_of(box, place, lengths, length_ptr, BOX: tl.constexpr, LENGTH: tl.constexpr):
    """Position of the tokens of a block, whether it lies in block and grid, and whether it also exists."""
    p = position(box, place, lengths, BOX)
    keep = inside(p, lengths) & (place < BOX[0] * BOX[1] * BOX[2])
    exists = keep
    if LENGTH:
        exists = keep & (place < tl.load(length_ptr + box))
    return p, keep, exists


@triton.jit(do_not_specialize=["extra", "most"])
def forward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, out_ptr, out_strides, lse_ptr, lse_strides,
    num_ptr, idx_ptr, bias_ptr, q_len_ptr, kv_len_ptr, lists, most,
    extra_k_ptr, extra_k_strides, extra_v_ptr, extra_v_strides, extra_mask_ptr, extra_ends_ptr,
    q_lengths, k_lengths, heads, extra, scale, kept_ptr, threshold, q_scale_ptr, k_scale_ptr, extra_scale_ptr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    QUERY_BOX: tl.constexpr, KEY_BOX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EXTRA_KEYS: tl.constexpr, BIAS: tl.constexpr, Q_LEN: tl.constexpr, KV_LEN: tl.constexpr, EXTRA: tl.constexpr,
    EXTRA_MASK: tl.constexpr, SKIP: tl.constexpr, SCALED: tl.constexpr, TILE: tl.constexpr, DESCRIPTOR: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """Strides are of `[B, X, Y, Z, heads, head_dim]` (extra: `[B, tokens, heads, head_dim]`), `lists` those of
    `launch.list_sizes`, and `GROUP` query heads share a key head.

    `TILE` is the part of a block of keys that an iteration loads, by a descriptor if `DESCRIPTOR`; without it tiles
    cross blocks. No block is cut short if `EVEN`. With `SKIP` a tile holds all tokens of a block, and blocks whose
    logits all lie below `threshold`, base 2, from the largest before are left out; `kept_ptr`, zeros `[B, heads,
    blocks, most]`, notes those that are not.

    With `SCALED` queries, keys and extra keys are 8-bit numbers, multiples of `q_scale_ptr` `[B, heads, blocks]`,
    `k_scale_ptr` `[B, key heads, blocks]` and `extra_scale_ptr` `[B, key heads]`, all contiguous.
    """
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    out_strides, lse_strides = elements(out_ptr, out_strides), elements(lse_ptr, lse_strides)
    batch, head, box, boxes, place = program(tl.program_id(0), q_lengths, heads, QUERY_BOX, ROWS)
    if Q_LEN:
        q_len_ptr = lengths_of(q_len_ptr, batch, boxes, lists[3])
    if KV_LEN:
        kv_len_ptr = lengths_of(kv_len_ptr, batch, box_count(k_lengths, KEY_BOX), lists[4])
    row, keep, exists = rows_of(box, place, q_lengths, q_len_ptr, QUERY_BOX, Q_LEN)
    q_ptr, q_sp = view(q_ptr, q_strides, batch, head, WIDE)
    k_ptr, k_sp = view(k_ptr, k_strides, batch, head // GROUP, WIDE)
    v_ptr, v_sp = view(v_ptr, v_strides, batch, head // GROUP, WIDE)
    q = load_vectors(q_ptr, offset(row, q_sp), q_strides[5], exists, D, BLOCK_D)
    entry = list_of(batch, head, boxes, lists) + box
    total = tl.load(num_ptr + entry) * (KEY_BOX[0] * KEY_BOX[1] * KEY_BOX[2])
    idx_ptr += entry * most
    if BIAS:
        bias_ptr += entry * most
    factor = scale * LOG2E
    if SCALED:
        key_head = batch.to(tl.int64) * (heads // GROUP) + head // GROUP
        k_scale_ptr += key_head * box_count(k_lengths, KEY_BOX)
        factor *= tl.load(q_scale_ptr + (batch.to(tl.int64) * heads + head) * boxes + box)

    acc = zeros(ROWS, BLOCK_DV)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    k_desc, v_desc, steps = k_ptr, v_ptr, (0, 0, 0)
    if TILE is not None:
        steps = local(TILE)
        if DESCRIPTOR:
            k_desc = describe(k_ptr, k_sp, k_lengths, D, TILE, BLOCK_D)
            v_desc = describe(v_ptr, v_sp, k_lengths, DV, TILE, BLOCK_DV)
    if SKIP:
        kept_ptr += ((batch.to(tl.int64) * heads + head) * boxes + box) * most
        TOKENS: tl.constexpr = KEY_BOX[0] * KEY_BOX[1] * KEY_BOX[2]
        column = tl.arange(0, COLUMNS)
        for c in tl.range(0, total // TOKENS, num_stages=STAGES):
            number = tl.load(idx_ptr + c)
            first = part_origin(number, 0, k_lengths, KEY_BOX, KEY_BOX)
            tokens = position(number, column, k_lengths, KEY_BOX)
            see = inside(tokens, k_lengths) & (column < TOKENS)
            if KV_LEN:
                see &= column < tl.load(kv_len_ptr + number)
            if TILE is None:
                k = load_vectors(k_ptr, offset(tokens, k_sp), k_strides[5], see, D, BLOCK_D)
            else:
                k = load_tile(
                    k_ptr, k_desc, first, steps, k_sp, k_strides[5], k_lengths, D, TILE, BLOCK_D, DESCRIPTOR, not EVEN
                )
            s = products(q, k, PRECISION).to(tl.float32) * factor
            if SCALED:
                s *= tl.load(k_scale_ptr + number)
            if BIAS:
                s += tl.load(bias_ptr + c).to(tl.float32) * LOG2E
            if TILE is None:
                s = tl.where(see[None, :], s, float("-inf"))
            else:
                s = hide_past_end(s, first, steps, k_lengths, TILE, EVEN)
            below = (tl.max(s, 1) - m < threshold) | (exists == 0)
            kept = tl.sum(tl.where(below, 0, 1), 0) > 0
            tl.store(kept_ptr + c, kept.to(tl.uint8))
            if kept:
                if TILE is None:
                    v = load_vectors(v_ptr, offset(tokens, v_sp), v_strides[5], see, DV, BLOCK_DV)
                else:
                    v = load_tile(
                        v_ptr, v_desc, first, steps, v_sp, v_strides[5], k_lengths, DV, TILE, BLOCK_DV,
                        DESCRIPTOR, not EVEN,
                    )
                acc, m, l = softmax_step(acc, m, l, s, v, 1.0, PRECISION)
    elif TILE is None:
        for c in tl.range(0, total, COLUMNS, num_stages=STAGES):
            column, see, bias = listed_keys(
                c, total, idx_ptr, bias_ptr, kv_len_ptr, k_lengths, KEY_BOX, COLUMNS, BIAS, KV_LEN
            )
            k = load_vectors(k_ptr, offset(column, k_sp), k_strides[5], see, D, BLOCK_D)
            s = products(q, k, PRECISION).to(tl.float32) * factor
            if SCALED:
                s *= listed_scales(c, total, idx_ptr, k_scale_ptr, KEY_BOX, COLUMNS)[None, :]
            s = tl.where(see[None, :], s + bias[None, :] if BIAS else s, float("-inf"))
            v = load_vectors(v_ptr, offset(column, v_sp), v_strides[5], see, DV, BLOCK_DV)
            acc, m, l = softmax_step(acc, m, l, s, v, 1.0, PRECISION)
    else:
        PARTS: tl.constexpr = (KEY_BOX[0] * KEY_BOX[1] * KEY_BOX[2]) // COLUMNS
        for c in tl.range(0, total // COLUMNS, num_stages=STAGES):
            number = tl.load(idx_ptr + c // PARTS)
            first = part_origin(number, c % PARTS, k_lengths, KEY_BOX, TILE)
            k = load_tile(
                k_ptr, k_desc, first, steps, k_sp, k_strides[5], k_lengths, D, TILE, BLOCK_D, DESCRIPTOR, not EVEN
            )
            s = products(q, k, PRECISION).to(tl.float32)
            unit = factor * tl.load(k_scale_ptr + number) if SCALED else factor
            s = hide_past_end(s, first, steps, k_lengths, TILE, EVEN)
            v = load_tile(
                v_ptr, v_desc, first, steps, v_sp, v_strides[5], k_lengths, DV, TILE, BLOCK_DV, DESCRIPTOR, not EVEN
            )
            if BIAS:
                bias = tl.load(bias_ptr + c // PARTS).to(tl.float32) * LOG2E
                acc, m, l = softmax_step(acc, m, l, s * unit + bias, v, 1.0, PRECISION)
            else:
                acc, m, l = softmax_step(acc, m, l, s, v, unit, PRECISION)
    if EXTRA:
        extra_k_ptr = extra_view(extra_k_ptr, extra_k_strides, batch, head // GROUP)
        extra_v_ptr = extra_view(extra_v_ptr, extra_v_strides, batch, head // GROUP)
        if SCALED:
            factor *= tl.load(extra_scale_ptr + key_head)
        for e in tl.range(0, extra_end(extra_ends_ptr, batch, extra, EXTRA_MASK), EXTRA_KEYS):
            k, v, see = load_extra_pair(
                extra_k_ptr, extra_k_strides, extra_v_ptr, extra_v_strides, extra_mask_ptr, batch, e, extra,
                D, DV, EXTRA_KEYS, BLOCK_D, BLOCK_DV, EXTRA_MASK,
            )
            s = products(q, k, PRECISION).to(tl.float32) * factor
            s = tl.where(see[None, :], s, float("-inf"))
            acc, m, l = softmax_step(acc, m, l, s, v, 1.0, PRECISION)

    out_ptr, out_sp = view(out_ptr, out_strides, batch, head, WIDE)
    lse_ptr, lse_sp = view(lse_ptr, lse_strides, batch, head, WIDE)
    some = exists & (l != 0.0)  # NaN counts as some, so that it shows
    l = tl.where(some, l, 1.0)
    lse = tl.where(some, (m + tl.log2(l)) * LN2, float("-inf"))
    store_vectors(out_ptr, offset(row, out_sp), hide_rows(scale_rows(acc, 1.0 / l), some), keep, DV, BLOCK_DV)
    tl.store(lse_ptr + offset(row, lse_sp), lse, mask=keep)
