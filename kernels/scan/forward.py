"""Kernels of scan attention: what the delta rule writes, the states before chunks, and the outputs.

A chunk is ROWS tokens in the order of the scan, of which the first chunk lacks `lead`; c are the sums of the log decay
in it. All exponents are differences of a later and an earlier sum, at most zero. Gates are `[B, heads, tokens]` in the
order of the scan, all else lies in the order of the tokens.
"""

import triton
import triton.language as tl

from ..common.triton.memory import elements, head_view, load_tile, store_tile
from ..common.triton.rounding import operand, rounded


@triton.jit
def program(heads, BLOCKS):
    """Head, block of features, entry of the batch and chunk of a program; heads are next to each other."""
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    return head, rest % BLOCKS, rest // BLOCKS


@triton.jit
def tokens_of(row, tokens, REVERSE: tl.constexpr):
    """Tokens of places in the scan; places before the first and behind the last are none, in either direction."""
    own = tokens - 1 - row if REVERSE else row
    return tl.where((row >= 0) & (row < tokens), own, tokens)


@triton.jit
def gates_of(ptr, batch, head, heads, row, tokens):
    """Gates of places in the scan, zeros outside."""
    keep = (row >= 0) & (row < tokens)
    return tl.load(ptr + (batch.to(tl.int64) * heads + head) * tokens + row, mask=keep, other=0.0)


@triton.jit
def pairs(sums, ROWS: tl.constexpr, DECAY: tl.constexpr):
    """Decay from the column's token to the row's, where the latter is the later one."""
    if DECAY:
        return tl.exp(sums[:, None] - sums[None, :])
    return tl.full([ROWS, ROWS], 1.0, tl.float32)


@triton.jit
def solve_kernel(
    k_ptr, k_strides, k_inner, v_ptr, v_strides, v_inner, decay_ptr, beta_ptr, u_ptr, w_ptr,
    tokens, heads, chunks, lead,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U = T beta v and W = T beta exp(c) k `[B, tokens, heads, …]` with T = (1 + A)^-1, one chunk a program.

    A is the part below the diagonal of beta_t exp(c_t - c_j) k_t.k_j.
    """
    k_strides, v_strides = elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    head, chunk, batch = program(heads, chunks)
    k_ptr = head_view(k_ptr, k_strides, batch, head)
    v_ptr = head_view(v_ptr, v_strides, batch, head)
    u_ptr += (batch.to(tl.int64) * tokens * heads + head) * E
    w_ptr += (batch.to(tl.int64) * tokens * heads + head) * D
    place = tl.arange(0, ROWS)
    row = chunk * ROWS - lead + place
    token = tokens_of(row, tokens, REVERSE)
    k = load_tile(k_ptr, k_strides, k_inner, token, tokens, D, BLOCK_D, WIDE).to(tl.float32)
    v = load_tile(v_ptr, v_strides, v_inner, token, tokens, E, BLOCK_E, WIDE).to(tl.float32)
    beta = gates_of(beta_ptr, batch, head, heads, row, tokens)
    sums = place.to(tl.float32)
    if DECAY:
        sums = tl.cumsum(gates_of(decay_ptr, batch, head, heads, row, tokens), 0)
    keys = rounded(k, PRECISION)
    lower = tl.dot(keys, tl.trans(keys), input_precision=PRECISION) * pairs(sums, ROWS, DECAY) * beta[:, None]
    lower = tl.where(place[:, None] > place[None, :], lower, 0.0)
    # forward substitution, row by row: powers of A would lose what many tokens alike write
    inverse = tl.where(place[:, None] == place[None, :], 1.0, 0.0)
    for i in range(1, ROWS):
        own = tl.sum(tl.where(place[:, None] == i, lower, 0.0), 0)
        below = tl.sum(own[:, None] * inverse, 0)
        inverse = tl.where(place[:, None] == i, inverse - below[None, :], inverse)
    inverse = rounded(inverse, PRECISION)
    u = tl.dot(inverse, rounded(v * beta[:, None], PRECISION), input_precision=PRECISION)
    store_tile(u_ptr, u, token, tokens, heads * E, E, BLOCK_E, WIDE)
    rise = beta * tl.exp(sums) if DECAY else beta
    w = tl.dot(inverse, rounded(k * rise[:, None], PRECISION), input_precision=PRECISION)
    store_tile(w_ptr, w, token, tokens, heads * D, D, BLOCK_D, WIDE)


@triton.jit
def state_kernel(
    k_ptr, k_strides, k_inner, v_ptr, v_strides, v_inner, w_ptr, w_strides, w_inner,
    decay_ptr, first_ptr, states_ptr, last_ptr, written_ptr,
    tokens, heads, chunks, lead, factor,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, FIRST: tl.constexpr, REVERSE: tl.constexpr,
    WIDE: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """States before chunks `[B, heads, chunks, D, E]` and the last `[B, heads, D, E]`; a block of values a program.

    With `DELTA` values are U, and U - W S is written, to memory `[B, tokens, heads, E]`, too.
    """
    k_strides, v_strides = elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    head, block, batch = program(heads, (E + COLUMNS - 1) // COLUMNS)
    k_ptr = head_view(k_ptr, k_strides, batch, head)
    v_ptr = head_view(v_ptr, v_strides, batch, head)
    d, e = tl.arange(0, BLOCK_D), block * COLUMNS + tl.arange(0, COLUMNS)
    inside = (d < D)[:, None] & (e < E)[None, :]
    place = (d * E)[:, None] + e[None, :]
    slice = batch.to(tl.int64) * heads + head
    states_ptr += slice * chunks * (D * E)
    state = tl.zeros([BLOCK_D, COLUMNS], tl.float32)
    if FIRST:
        state = tl.load(first_ptr + slice * (D * E) + place, mask=inside, other=0.0)
    if DELTA:
        w_strides = elements(w_ptr, w_strides)
        w_ptr = head_view(w_ptr, w_strides, batch, head)
        written_ptr += (batch.to(tl.int64) * tokens * heads + head) * E
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        tl.store(states_ptr + place, state, mask=inside)
        states_ptr += D * E
        row = chunk * ROWS - lead + tl.arange(0, ROWS)
        token = tokens_of(row, tokens, REVERSE)
        k = load_tile(k_ptr, k_strides, k_inner, token, tokens, D, BLOCK_D, WIDE)
        v = load_tile(v_ptr, v_strides, v_inner, token, tokens, E, COLUMNS, WIDE, block * COLUMNS)
        if DELTA:
            w = load_tile(w_ptr, w_strides, w_inner, token, tokens, D, BLOCK_D, WIDE)
            stored = tl.dot(rounded(w, PRECISION), rounded(state, PRECISION), input_precision=PRECISION)
            v = v.to(tl.float32) - stored
            store_tile(written_ptr, v, token, tokens, heads * E, E, COLUMNS, WIDE, block * COLUMNS)
        keys = k.to(tl.float32) * factor
        if DECAY:
            decay = gates_of(decay_ptr, batch, head, heads, row, tokens)
            total = tl.sum(decay, 0)
            keys *= tl.exp(total - tl.cumsum(decay, 0))[:, None]
            state *= tl.exp(total)
        keys = tl.trans(operand(keys, k, WIDEN, PRECISION))
        state = tl.dot(keys, operand(v, v, WIDEN, PRECISION), state, input_precision=PRECISION)
    tl.store(last_ptr + slice * (D * E) + place, state, mask=inside)


@triton.jit
def output_kernel(
    q_ptr, q_strides, q_inner, k_ptr, k_strides, k_inner, v_ptr, v_strides, v_inner, decay_ptr, states_ptr, out_ptr,
    tokens, heads, chunks, lead, near, far,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    DECAY: tl.constexpr, STRICT: tl.constexpr, REVERSE: tl.constexpr,
    WIDE: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out `[B, tokens, heads, E]`, a chunk and a block of values a program.

    `near` is the factor on what a chunk's own tokens wrote, `far` on what those before it did.
    """
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    BLOCKS: tl.constexpr = (E + COLUMNS - 1) // COLUMNS
    head, rest, batch = program(heads, chunks * BLOCKS)
    block, chunk = rest % BLOCKS, rest // BLOCKS
    q_ptr = head_view(q_ptr, q_strides, batch, head)
    k_ptr = head_view(k_ptr, k_strides, batch, head)
    v_ptr = head_view(v_ptr, v_strides, batch, head)
    out_ptr += (batch.to(tl.int64) * tokens * heads + head) * E
    states_ptr += ((batch.to(tl.int64) * heads + head) * chunks + chunk) * (D * E)
    place = tl.arange(0, ROWS)
    row = chunk * ROWS - lead + place
    token = tokens_of(row, tokens, REVERSE)
    q = load_tile(q_ptr, q_strides, q_inner, token, tokens, D, BLOCK_D, WIDE)
    sums = place.to(tl.float32)
    if DECAY:
        sums = tl.cumsum(gates_of(decay_ptr, batch, head, heads, row, tokens), 0)
    # what chunks before this one wrote
    d, e = tl.arange(0, BLOCK_D), block * COLUMNS + tl.arange(0, COLUMNS)
    inside = (d < D)[:, None] & (e < E)[None, :]
    state = tl.load(states_ptr + (d * E)[:, None] + e[None, :], mask=inside, other=0.0)
    reads = q.to(tl.float32) * far
    if DECAY:
        reads *= tl.exp(sums)[:, None]
    out = tl.dot(rounded(reads, PRECISION), rounded(state, PRECISION), input_precision=PRECISION)
    # what its own tokens wrote
    k = load_tile(k_ptr, k_strides, k_inner, token, tokens, D, BLOCK_D, WIDE)
    left, right = operand(q, q, WIDEN, PRECISION), tl.trans(operand(k, k, WIDEN, PRECISION))
    weights = tl.dot(left, right, input_precision=PRECISION) * pairs(sums, ROWS, DECAY) * near
    before = place[:, None] > place[None, :] if STRICT else place[:, None] >= place[None, :]
    weights = tl.where(before, weights, 0.0)
    v = load_tile(v_ptr, v_strides, v_inner, token, tokens, E, COLUMNS, WIDE, block * COLUMNS)
    right = operand(v, v, WIDEN, PRECISION)
    out = tl.dot(operand(weights, v, WIDEN, PRECISION), right, out, input_precision=PRECISION)
    store_tile(out_ptr, out, token, tokens, heads * E, E, COLUMNS, WIDE, block * COLUMNS)
