"""The gradient of the log decay in scan attention; all other gradients are scans, see `gradients.py`."""

import triton
import triton.language as tl

from ..common.triton.memory import elements, head_view, load_tile
from ..common.triton.rounding import operand, rounded
from .forward import gates_of, pairs, program, tokens_of


@triton.jit
def inner(left, right, acc, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """`acc` and products of all rows of two tiles."""
    left, right = operand(left, left, WIDEN, PRECISION), tl.trans(operand(right, right, WIDEN, PRECISION))
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def outer(left, right, acc, PRECISION: tl.constexpr):
    """`acc` and the product of a tile of tokens and a part of a state, in float32."""
    left = rounded(left.to(tl.float32), PRECISION)
    return tl.dot(left, rounded(right, PRECISION), acc, input_precision=PRECISION)


@triton.jit
def decay_kernel(
    q_ptr, q_strides, q_inner, k_ptr, k_strides, k_inner, u_ptr, u_strides, u_inner, do_ptr, do_strides, do_inner,
    dv_ptr, dv_strides, dv_inner, decay_ptr, states_ptr, ends_ptr, out_ptr,
    tokens, heads, chunks, scale, strict, batches,
    D: tl.constexpr, E: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
    DELTA: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the log decay, parts `[blocks, B, heads, tokens]` in the order of the scan; a chunk and a block of
    the features of keys a program.

    A decay is a factor on what flows over its token, from before it to it or to later ones. States before chunks and
    gradients of those behind them, the latter from the last chunk to the first and before the decay of the token that
    follows, are `[B, heads, chunks, E, D]`. `strict` is 1 where tokens do not read what they wrote.
    """
    q_strides, k_strides, u_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(u_ptr, u_strides)
    do_strides = elements(do_ptr, do_strides)
    head, rest, batch = program(heads, chunks * ((D + COLUMNS - 1) // COLUMNS))
    chunk, block = rest % chunks, rest // chunks
    u_ptr, do_ptr = head_view(u_ptr, u_strides, batch, head), head_view(do_ptr, do_strides, batch, head)
    if DELTA:
        dv_strides = elements(dv_ptr, dv_strides)
        dv_ptr = head_view(dv_ptr, dv_strides, batch, head)
    slice = (batch.to(tl.int64) * heads + head) * chunks
    states_ptr += (slice + chunk) * (D * E)
    ends_ptr += (slice + chunks - 1 - chunk) * (D * E)
    place = tl.arange(0, ROWS)
    row = chunk * ROWS + place
    token = tokens_of(row, tokens, REVERSE)
    d = block * COLUMNS + tl.arange(0, COLUMNS)
    products, less = tl.zeros([ROWS, ROWS], tl.float32), tl.zeros([ROWS, ROWS], tl.float32)
    read, met = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    taken, through = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([STEP, COLUMNS], tl.float32)
    # products over the features of values, with the state before the chunk and the gradient of that behind it
    for first in range(0, E, STEP):
        e = first + tl.arange(0, STEP)
        inside, own = (e < E)[:, None] & (d < D)[None, :], (e * D)[:, None] + d[None, :]
        state = tl.load(states_ptr + own, mask=inside, other=0.0)
        end = tl.load(ends_ptr + own, mask=inside, other=0.0)
        u = load_tile(u_ptr, u_strides, u_inner, token, tokens, E, STEP, WIDE, first)
        do = load_tile(do_ptr, do_strides, do_inner, token, tokens, E, STEP, WIDE, first)
        products = inner(do, u, products, WIDEN, PRECISION)
        read, met = outer(do, state, read, PRECISION), outer(u, end, met, PRECISION)
        through += state * end
        if DELTA:
            dv = load_tile(dv_ptr, dv_strides, dv_inner, token, tokens, E, STEP, WIDE, first)
            less = inner(dv, u, less, WIDEN, PRECISION)
            taken = outer(dv, state, taken, PRECISION)
    # what flows from the column's token to the row's, from before the chunk to a token, from a token to behind it
    decay = gates_of(decay_ptr, batch, head, heads, row, tokens)
    sums, total = tl.cumsum(decay, 0), tl.sum(decay, 0)
    follows = tl.exp(gates_of(decay_ptr, batch, head, heads, (chunk + 1) * ROWS, tokens))
    empty = tl.zeros([ROWS, ROWS], tl.float32)
    q = load_tile(head_view(q_ptr, q_strides, batch, head), q_strides, q_inner, token, tokens, D, COLUMNS, WIDE,
                  block * COLUMNS)  # fmt: skip
    k = load_tile(head_view(k_ptr, k_strides, batch, head), k_strides, k_inner, token, tokens, D, COLUMNS, WIDE,
                  block * COLUMNS)  # fmt: skip
    logits = inner(q, k, empty, WIDEN, PRECISION)
    near = tl.where(place[:, None] - strict >= place[None, :], logits * products * scale, 0.0)
    reads = tl.sum(read * q.to(tl.float32), 1) * scale
    if DELTA:
        logits = inner(k, k, empty, WIDEN, PRECISION)
        near -= tl.where(place[:, None] > place[None, :], logits * less, 0.0)
        reads -= tl.sum(taken * k.to(tl.float32), 1)
    near = tl.where(place[:, None] >= place[None, :], near * pairs(sums, ROWS, True), 0.0)
    reads *= tl.exp(sums)
    writes = tl.sum(met * k.to(tl.float32), 1) * tl.exp(total - sums) * follows
    # over a token flows what comes from the columns before it to the rows from it on
    from_before = tl.where(place[:, None] >= place[None, :], tl.cumsum(near, 1) - near + reads[:, None], 0.0)
    to_behind = tl.where(place[:, None] < place[None, :], writes[:, None], 0.0)
    out = tl.sum(from_before + to_behind, 0) + tl.sum(through) * tl.exp(total) * follows
    out_ptr += ((block.to(tl.int64) * batches + batch) * heads + head) * tokens
    tl.store(out_ptr + row, out, mask=row < tokens)
