"""Triton helpers shared by the block-sparse kernels: where the tokens of blocks are.

Every grid is treated as three-dimensional; a 1-D or 2-D grid has leading axes of length 1. `BOX` is a 3-tuple of
constants, tokens of a block along the axes. Blocks are walked as one sequence of tokens, block after block of a list,
so tiles are full whatever the size of a block.
"""

import triton
import triton.language as tl

from ..common.triton.memory import inside
from ..common.triton.softmax import LOG2E
from ..neighborhood.tile import shift


@triton.jit
def box_count(lengths, BOX: tl.constexpr):
    """Boxes of a grid, those cut short included."""
    return tl.cdiv(lengths[0], BOX[0]) * tl.cdiv(lengths[1], BOX[1]) * tl.cdiv(lengths[2], BOX[2])


@triton.jit
def position(box, place, lengths, BOX: tl.constexpr):
    """Grid coordinates of the tokens at `place` (C order in the whole block) of blocks, scalar or one a token."""
    ny, nz = tl.cdiv(lengths[1], BOX[1]), tl.cdiv(lengths[2], BOX[2])
    x = box // (ny * nz) * BOX[0] + place // (BOX[1] * BOX[2])
    y = box // nz % ny * BOX[1] + place // BOX[2] % BOX[1]
    z = box % nz * BOX[2] + place % BOX[2]
    return x, y, z


@triton.jit
def part_origin(box, part, lengths, BOX: tl.constexpr, TILE: tl.constexpr):
    """Grid coordinates of the first token of a part of a block; parts of `TILE` tokens divide it, in C order."""
    ny, nz = tl.cdiv(lengths[1], BOX[1]), tl.cdiv(lengths[2], BOX[2])
    PY: tl.constexpr = BOX[1] // TILE[1]
    PZ: tl.constexpr = BOX[2] // TILE[2]
    x = box // (ny * nz) * BOX[0] + part // (PY * PZ) * TILE[0]
    y = box // nz % ny * BOX[1] + part // PZ % PY * TILE[1]
    z = box % nz * BOX[2] + part % PZ * TILE[2]
    return x, y, z


@triton.jit
def hide_past_end(s, first, steps, lengths, TILE: tl.constexpr, EVEN: tl.constexpr):
    """Logits `[rows, columns]` of the part of a block that begins at `first`, -inf past the end of the grid.

    No part reaches there if `EVEN`; other parts are found by one comparison of numbers, and cost no more.
    """
    if EVEN:
        return s
    past = (first[0] + TILE[0] > lengths[0]) | (first[1] + TILE[1] > lengths[1]) | (first[2] + TILE[2] > lengths[2])
    if past:
        s = tl.where(inside(shift(first, steps), lengths)[None, :], s, float("-inf"))
    return s


@triton.jit
def view(ptr, strides, batch, head, WIDE: tl.constexpr):
    """Pointer to one batch and head, and the spatial strides; `strides` are those of `[B, X, Y, Z, heads, …]`.

    `WIDE` makes offsets inside it 64 bits.
    """
    sx, sy, sz = strides[1], strides[2], strides[3]
    ptr += batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[4]
    if WIDE:
        sx, sy, sz = tl.cast(sx, tl.int64), tl.cast(sy, tl.int64), tl.cast(sz, tl.int64)
    return ptr, (sx, sy, sz)


@triton.jit
def list_of(batch, head, boxes, lists):
    """Row of a list of `[B or 1, lists, blocks]` for block 0; see `launch.list_sizes`."""
    row = tl.where(lists[0] == 1, 0, batch) * lists[1] + head // lists[2]
    return row.to(tl.int64) * boxes


@triton.jit
def lengths_of(length_ptr, batch, boxes, rows):
    """Lengths of the blocks of a batch entry, in `rows` rows of one length a block."""
    return length_ptr + tl.where(rows == 1, 0, batch).to(tl.int64) * boxes


@triton.jit
def listed_keys(
    c, total, idx_ptr, bias_ptr, kv_len_ptr, lengths,
    BOX: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr, KV_LEN: tl.constexpr,
):
    """The `COLUMNS` tokens from number `c` on of the blocks of a list: position, whether it exists, base-2 bias.

    `total` is the tokens of all blocks of the list.
    """
    TOKENS: tl.constexpr = BOX[0] * BOX[1] * BOX[2]
    column = c + tl.arange(0, COLUMNS)
    keep = column < total
    bias = tl.zeros([COLUMNS], tl.float32)
    if TOKENS % COLUMNS == 0:  # the tile lies in one block
        entry = c // TOKENS
        place = column - entry * TOKENS
        box = tl.load(idx_ptr + entry)
        if BIAS:
            bias += tl.load(bias_ptr + entry).to(tl.float32)
        if KV_LEN:
            keep &= place < tl.load(kv_len_ptr + box)
    else:
        entry = column // TOKENS
        place = column - entry * TOKENS
        box = tl.load(idx_ptr + entry, mask=keep, other=0)
        if BIAS:
            bias = tl.load(bias_ptr + entry, mask=keep, other=0.0).to(tl.float32)
        if KV_LEN:
            keep &= place < tl.load(kv_len_ptr + box, mask=keep, other=0)
    p = position(box, place, lengths, BOX)
    return p, keep & inside(p, lengths), bias * LOG2E


@triton.jit
def listed_scales(c, total, idx_ptr, scale_ptr, BOX: tl.constexpr, COLUMNS: tl.constexpr):
    """Scales of the `COLUMNS` 8-bit tokens from number `c` on of the blocks of a list; see `listed_keys`."""
    TOKENS: tl.constexpr = BOX[0] * BOX[1] * BOX[2]
    if TOKENS % COLUMNS == 0:
        return tl.full([COLUMNS], tl.load(scale_ptr + tl.load(idx_ptr + c // TOKENS)), tl.float32)
    else:
        column = c + tl.arange(0, COLUMNS)
        box = tl.load(idx_ptr + column // TOKENS, mask=column < total, other=0)
        return tl.load(scale_ptr + box, mask=column < total, other=0.0)


@triton.jit
def listed_queries(
    c, total, order_ptr, bias_ptr, q_len_ptr, lengths, most,
    BOX: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr, Q_LEN: tl.constexpr,
):
    """`listed_keys` for queries, over entries (query block * `most` + place in its list) that name a block of keys."""
    TOKENS: tl.constexpr = BOX[0] * BOX[1] * BOX[2]
    column = c + tl.arange(0, COLUMNS)
    keep = column < total
    bias = tl.zeros([COLUMNS], tl.float32)
    if TOKENS % COLUMNS == 0:
        entry = c // TOKENS
        place = column - entry * TOKENS
        named = tl.load(order_ptr + entry)
        box = named // most
        if BIAS:
            bias += tl.load(bias_ptr + named).to(tl.float32)
        if Q_LEN:
            keep &= place < tl.load(q_len_ptr + box)
    else:
        entry = column // TOKENS
        place = column - entry * TOKENS
        named = tl.load(order_ptr + entry, mask=keep, other=0)
        box = named // most
        if BIAS:
            bias = tl.load(bias_ptr + named, mask=keep, other=0.0).to(tl.float32)
        if Q_LEN:
            keep &= place < tl.load(q_len_ptr + box, mask=keep, other=0)
    p = position(box, place, lengths, BOX)
    return p, keep & inside(p, lengths), bias * LOG2E
