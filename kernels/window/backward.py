"""Backward kernels of window attention. No atomics: every gradient is summed by one program in a fixed order.

With P = exp(S - lse) and delta = rowsum(dO * O) - dlse, dS = P * (dO V^T - delta) (arXiv:2205.14135, appendix B.4).
Without a halo a window owns its keys, and `window_kernel` computes all gradients of windows that fit into one tile in
one pass. Otherwise `query_kernel` walks the keys of a window for dQ and leaves delta behind, `key_kernel` walks the
windows that see a cell of keys for dK and dV, and `bias_kernel` walks windows for the gradient of the bias.
Tiles are computed transposed, `[keys, queries]`, where dK and dV need them so: some Triton releases miscompile the
transpose of an MMA result on Hopper.
"""

import triton
import triton.language as tl

from ..common.triton.memory import elements, head_view
from ..common.triton.softmax import LOG2E, key_step, query_step
from .tile import NONE, bias_pointers, load, offset, place, sees, split, store, tile, windows


@triton.jit
def transposed_logits(
    k, q, see, bias, scale, BIAS: tl.constexpr, PRECISION: tl.constexpr
):
    """Base-2 logits `[keys, queries]`, -inf where a query does not see a key."""
    st = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
    if BIAS:
        st += bias.to(tl.float32) * LOG2E
    return tl.where(see, st, float("-inf"))


@triton.jit
def column_sees(
    key_region, region, key_keep, PACK: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, SHIFT: tl.constexpr
):
    """`sees`, transposed: `[keys, queries]`, keys that exist only."""
    see = sees(key_region, region, region >= 0, PACK, KEYS, QUERIES, SHIFT)
    return see & key_keep[:, None]


@triton.jit
def window_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, out_ptr, out_strides, do_ptr, do_strides,
    lse_ptr, lse_strides, dlse_ptr, dlse_strides, delta_ptr, dq_ptr, dq_strides, dk_ptr, dk_strides, dv_ptr, dv_strides,
    bias_ptr, partial_ptr, lengths, batches, key_heads, chunk, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, HALO: tl.constexpr, MARGIN: tl.constexpr,
    PACK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, DBIAS: tl.constexpr,
):
    """All gradients of windows of at most `QUERIES` = `KEYS` tokens without a halo, and delta.

    A program takes `chunk` packs of one key head. With `DBIAS` (one query head a key head) it leaves the sum of its dS
    in `partial_ptr`, `[chunks, PACK, heads, T, T]`. delta has the strides of lse. Where values are as wide as keys, dQ
    has the strides of out and dV those of dK: theirs are None.
    """
    if dq_strides is None:
        dq_strides, dv_strides = out_strides, dk_strides
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    out_strides, do_strides = elements(out_ptr, out_strides), elements(do_ptr, do_strides)
    lse_strides, dlse_strides = elements(lse_ptr, lse_strides), elements(dlse_ptr, dlse_strides)
    dq_strides, dk_strides = elements(dq_ptr, dq_strides), elements(dk_ptr, dk_strides)
    dv_strides = elements(dv_ptr, dv_strides)
    T: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    counts = windows(lengths, WINDOW)
    packs = tl.cdiv(counts[0] * counts[1] * counts[2], PACK)
    chunks = tl.cdiv(packs * batches, chunk)
    part, key_head = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    # the gradient of the bias stays in registers over all windows of the chunk
    dbias = tl.zeros([PACK * KEYS, PACK * QUERIES], tl.float32)
    i = tl.arange(0, PACK * QUERIES)
    row, column = (i % QUERIES)[None, :], (i % KEYS)[:, None]
    exists = (row < T) & (column < T)
    for step in range(part * chunk, tl.minimum(part * chunk + chunk, packs * batches)):
        batch = step // packs
        _, where, keep, region = tile(step % packs * PACK, 0, lengths, PACK, QUERIES, WINDOW, SHIFT, NONE, NONE)
        # keys and values of the windows, shared by the query heads of the group
        k = load(head_view(k_ptr, k_strides, batch, key_head), k_strides, where, keep, D, BLOCK_D, WIDE)
        v = load(head_view(v_ptr, v_strides, batch, key_head), v_strides, where, keep, DV, BLOCK_DV, WIDE)
        dk = tl.zeros([PACK * KEYS, BLOCK_D], tl.float32)
        dv = tl.zeros([PACK * KEYS, BLOCK_DV], tl.float32)
        see = column_sees(region, region, keep, PACK, KEYS, QUERIES, SHIFT)
        for g in range(GROUP):
            head = key_head * GROUP + g
            q = load(head_view(q_ptr, q_strides, batch, head), q_strides, where, keep, D, BLOCK_D, WIDE)
            do = load(head_view(do_ptr, do_strides, batch, head), do_strides, where, keep, DV, BLOCK_DV, WIDE)
            out = load(head_view(out_ptr, out_strides, batch, head), out_strides, where, keep, DV, BLOCK_DV, WIDE)
            at = offset(where, lse_strides, WIDE)
            lse2 = tl.load(head_view(lse_ptr, lse_strides, batch, head) + at, mask=keep, other=float("inf")) * LOG2E
            dlse = head_view(dlse_ptr, dlse_strides, batch, head) + offset(where, dlse_strides, WIDE)
            delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1) - tl.load(dlse, mask=keep, other=0.0)
            tl.store(head_view(delta_ptr, lse_strides, batch, head) + at, delta, mask=keep)
            bias = 0.0
            if BIAS:  # kept in cache, not in registers
                bias = tl.load(bias_pointers(bias_ptr, head, row, column, WINDOW, NONE), mask=exists, other=0.0)
            # probabilities again, transposed; dV, dS and with it dK and dQ
            pt = tl.exp2(transposed_logits(k, q, see, bias, scale, BIAS, PRECISION) - lse2[None, :])
            dv = tl.dot(pt.to(do.dtype), do, dv, input_precision=PRECISION)
            dst = pt * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
            if DBIAS:
                dbias += dst
            rounded = dst.to(q.dtype)
            dk = tl.dot(rounded, q, dk, input_precision=PRECISION)
            dqt = tl.dot(tl.trans(k), rounded, input_precision=PRECISION) * scale  # [BLOCK_D, queries]
            d = tl.arange(0, BLOCK_D)
            to = head_view(dq_ptr, dq_strides, batch, head) + offset(where, dq_strides, WIDE)[None, :] + d[:, None]
            tl.store(to, dqt.to(dq_ptr.dtype.element_ty), mask=keep[None, :] & (d < D)[:, None])
        store(head_view(dk_ptr, dk_strides, batch, key_head), dk_strides, where, keep, dk * scale, D, BLOCK_D, WIDE)
        store(head_view(dv_ptr, dv_strides, batch, key_head), dv_strides, where, keep, dv, DV, BLOCK_DV, WIDE)
    if DBIAS:
        same = (i // QUERIES)[None, :] == (i // KEYS)[:, None]
        first = (tl.cast(part, tl.int64) * PACK + i // QUERIES) * key_heads + key_head
        tl.store(partial_ptr + (first * (T * T))[None, :] + row * T + column, dbias, mask=same & exists)


@triton.jit
def query_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, out_ptr, out_strides, do_ptr, do_strides,
    lse_ptr, lse_strides, dlse_ptr, dlse_strides, delta_ptr, dq_ptr, dq_strides, bias_ptr, lengths, heads, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, HALO: tl.constexpr, MARGIN: tl.constexpr,
    PACK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):
    """dQ, and delta for the other kernels, as `forward_kernel` goes; strides as in `window_kernel`."""
    if dq_strides is None:
        dq_strides = out_strides
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    out_strides, do_strides = elements(out_ptr, out_strides), elements(do_ptr, do_strides)
    lse_strides, dlse_strides = elements(lse_ptr, lse_strides), elements(dlse_ptr, dlse_strides)
    dq_strides = elements(dq_ptr, dq_strides)
    T: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    S: tl.constexpr = (WINDOW[0] + 2 * HALO[0]) * (WINDOW[1] + 2 * HALO[1]) * (WINDOW[2] + 2 * HALO[2])
    BLOCKS: tl.constexpr = (T + QUERIES - 1) // QUERIES
    # of this program: a pack of windows, a block of their slots, a head and a batch entry
    counts = windows(lengths, WINDOW)
    packs = tl.cdiv(counts[0] * counts[1] * counts[2], PACK)
    pid = tl.program_id(0)
    window, block = pid % packs * PACK, pid // packs % BLOCKS
    head, batch = pid // packs // BLOCKS % heads, pid // packs // BLOCKS // heads

    row, where, keep, region = tile(window, block * QUERIES, lengths, PACK, QUERIES, WINDOW, SHIFT, NONE, NONE)
    q = load(head_view(q_ptr, q_strides, batch, head), q_strides, where, keep, D, BLOCK_D, WIDE)
    do = load(head_view(do_ptr, do_strides, batch, head), do_strides, where, keep, DV, BLOCK_DV, WIDE)
    out = load(head_view(out_ptr, out_strides, batch, head), out_strides, where, keep, DV, BLOCK_DV, WIDE)
    at = offset(where, lse_strides, WIDE)
    # delta for this kernel and the others
    lse2 = tl.load(head_view(lse_ptr, lse_strides, batch, head) + at, mask=keep, other=float("inf")) * LOG2E
    dlse = head_view(dlse_ptr, dlse_strides, batch, head) + offset(where, dlse_strides, WIDE)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1) - tl.load(dlse, mask=keep, other=0.0)
    tl.store(head_view(delta_ptr, lse_strides, batch, head) + at, delta, mask=keep)

    k_ptr = head_view(k_ptr, k_strides, batch, head // GROUP)
    v_ptr = head_view(v_ptr, v_strides, batch, head // GROUP)
    dq = (tl.zeros([PACK * QUERIES, BLOCK_D], tl.float32),)
    # dQ over the keys of the windows
    for first in range(0, S, KEYS):
        column, key_where, key_keep, key_region = tile(
            window, first, lengths, PACK, KEYS, WINDOW, SHIFT, HALO, MARGIN
        )
        k = load(k_ptr, k_strides, key_where, key_keep, D, BLOCK_D, WIDE)
        v = load(v_ptr, v_strides, key_where, key_keep, DV, BLOCK_DV, WIDE)
        see = sees(region, key_region, key_keep, PACK, QUERIES, KEYS, SHIFT)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        if BIAS:
            entry = bias_pointers(bias_ptr, head, row[:, None], column[None, :], WINDOW, HALO)
            s += tl.load(entry, mask=see & keep[:, None], other=0.0).to(tl.float32) * LOG2E
        s = tl.where(see, s, float("-inf"))
        dq = query_step(dq, (do,), lse2, delta, s, (k,), (v,), 1.0, PRECISION)
    store(head_view(dq_ptr, dq_strides, batch, head), dq_strides, where, keep, dq[0] * scale, D, BLOCK_D, WIDE)


@triton.jit
def key_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, do_ptr, do_strides,
    lse_ptr, delta_ptr, lse_strides, dk_ptr, dk_strides, dv_ptr, dv_strides, bias_ptr, lengths, key_heads, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, HALO: tl.constexpr, MARGIN: tl.constexpr,
    PACK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):
    """dK and dV of a block of a cell of keys, over all windows that see it and all query heads that share them.

    A cell has the size of a window and begins where a window begins; cells of keys before the first and after the last
    query lie round the windows. `PACK` is 1. Strides are as in `window_kernel`.
    """
    if dv_strides is None:
        dv_strides = dk_strides
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    do_strides, lse_strides = elements(do_ptr, do_strides), elements(lse_ptr, lse_strides)
    dk_strides, dv_strides = elements(dk_ptr, dk_strides), elements(dv_ptr, dv_strides)
    T: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    SPAN: tl.constexpr = (WINDOW[0] + 2 * HALO[0], WINDOW[1] + 2 * HALO[1], WINDOW[2] + 2 * HALO[2])
    BLOCKS: tl.constexpr = (T + KEYS - 1) // KEYS
    REACH: tl.constexpr = (
        (HALO[0] + WINDOW[0] - 1) // WINDOW[0],
        (HALO[1] + WINDOW[1] - 1) // WINDOW[1],
        (HALO[2] + WINDOW[2] - 1) // WINDOW[2],
    )
    AROUND: tl.constexpr = (2 * REACH[0] + 1, 2 * REACH[1] + 1, 2 * REACH[2] + 1)
    OUTER: tl.constexpr = (
        (MARGIN[0] + WINDOW[0] - 1) // WINDOW[0],
        (MARGIN[1] + WINDOW[1] - 1) // WINDOW[1],
        (MARGIN[2] + WINDOW[2] - 1) // WINDOW[2],
    )
    counts = windows(lengths, WINDOW)
    cells = (counts[0] + 2 * OUTER[0], counts[1] + 2 * OUTER[1], counts[2] + 2 * OUTER[2])
    total = cells[0] * cells[1] * cells[2]
    pid = tl.program_id(0)
    cx, cy, cz = split(pid % total, cells)
    cx, cy, cz = cx - OUTER[0], cy - OUTER[1], cz - OUTER[2]
    block = pid // total % BLOCKS
    key_head, batch = pid // total // BLOCKS % key_heads, pid // total // BLOCKS // key_heads

    # keys and values of the block stay in registers
    slot = block * KEYS + tl.arange(0, KEYS)
    sx, sy, sz = split(slot, WINDOW)
    where, key_keep, key_region = place((cx, cy, cz), (sx, sy, sz), lengths, WINDOW, SHIFT, NONE, MARGIN)
    key_keep &= slot < T
    k = load(head_view(k_ptr, k_strides, batch, key_head), k_strides, where, key_keep, D, BLOCK_D, WIDE)
    v = load(head_view(v_ptr, v_strides, batch, key_head), v_strides, where, key_keep, DV, BLOCK_DV, WIDE)
    dk, dv = (tl.zeros([KEYS, BLOCK_D], tl.float32),), (tl.zeros([KEYS, BLOCK_DV], tl.float32),)
    # windows that see the cell: those around it, as far as the halo reaches
    for around in range(AROUND[0] * AROUND[1] * AROUND[2]):
        ax, ay, az = split(around, AROUND)
        wx, wy, wz = cx + ax - REACH[0], cy + ay - REACH[1], cz + az - REACH[2]
        exists = (wx >= 0) & (wx < counts[0]) & (wy >= 0) & (wy < counts[1]) & (wz >= 0) & (wz < counts[2])
        kx = sx + (cx - wx) * WINDOW[0] + HALO[0]  # slots of these keys in that window
        ky = sy + (cy - wy) * WINDOW[1] + HALO[1]
        kz = sz + (cz - wz) * WINDOW[2] + HALO[2]
        seen = key_keep & (kx >= 0) & (kx < SPAN[0]) & (ky >= 0) & (ky < SPAN[1]) & (kz >= 0) & (kz < SPAN[2])
        column = (kx * SPAN[1] + ky) * SPAN[2] + kz
        window = (wx * counts[1] + wy) * counts[2] + wz
        for g in range(tl.where(exists, GROUP, 0)):
            head = key_head * GROUP + g
            for first in range(0, T, QUERIES):
                row, query, keep, region = tile(window, first, lengths, 1, QUERIES, WINDOW, SHIFT, NONE, NONE)
                q = load(head_view(q_ptr, q_strides, batch, head), q_strides, query, keep, D, BLOCK_D, WIDE)
                do = load(head_view(do_ptr, do_strides, batch, head), do_strides, query, keep, DV, BLOCK_DV, WIDE)
                at = offset(query, lse_strides, WIDE)
                lse2 = tl.load(head_view(lse_ptr, lse_strides, batch, head) + at, mask=keep, other=float("inf")) * LOG2E
                delta = tl.load(head_view(delta_ptr, lse_strides, batch, head) + at, mask=keep, other=0.0)
                see = column_sees(key_region, region, seen, 1, KEYS, QUERIES, SHIFT)
                bias = 0.0
                if BIAS:
                    entry = bias_pointers(bias_ptr, head, row[None, :], column[:, None], WINDOW, HALO)
                    bias = tl.load(entry, mask=see & keep[None, :], other=0.0)
                st = transposed_logits(k, q, see, bias, scale, BIAS, PRECISION)
                dk, dv = key_step(dk, dv, (q,), (do,), lse2, delta, st, (v,), 1.0, PRECISION)
    store(head_view(dk_ptr, dk_strides, batch, key_head), dk_strides, where, key_keep, dk[0] * scale, D, BLOCK_D, WIDE)
    store(head_view(dv_ptr, dv_strides, batch, key_head), dv_strides, where, key_keep, dv[0], DV, BLOCK_DV, WIDE)


@triton.jit
def bias_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, do_ptr, do_strides, lse_ptr, delta_ptr, lse_strides,
    bias_ptr, partial_ptr, lengths, batches, heads, chunk, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, HALO: tl.constexpr, MARGIN: tl.constexpr,
    PACK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):
    """Sums of dS over `chunk` windows of all batches, `[chunks, heads, T, S]`, for a block of queries and of keys."""
    q_strides, k_strides, v_strides = elements(q_ptr, q_strides), elements(k_ptr, k_strides), elements(v_ptr, v_strides)
    do_strides, lse_strides = elements(do_ptr, do_strides), elements(lse_ptr, lse_strides)
    STEP: tl.constexpr = 512 // q_ptr.dtype.element_ty.primitive_bitwidth  # of the head dim: registers hold no more
    LONGER: tl.constexpr = D if D > DV else DV
    T: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    S: tl.constexpr = (WINDOW[0] + 2 * HALO[0]) * (WINDOW[1] + 2 * HALO[1]) * (WINDOW[2] + 2 * HALO[2])
    ROWS: tl.constexpr = (T + QUERIES - 1) // QUERIES
    COLUMNS: tl.constexpr = (S + KEYS - 1) // KEYS
    counts = windows(lengths, WINDOW)
    total = counts[0] * counts[1] * counts[2]
    pid = tl.program_id(0)
    rows, columns = pid % ROWS * QUERIES, pid // ROWS % COLUMNS * KEYS
    head, part = pid // (ROWS * COLUMNS) % heads, pid // (ROWS * COLUMNS) // heads
    key_head = head // GROUP
    row, column = rows + tl.arange(0, QUERIES), columns + tl.arange(0, KEYS)
    entry = bias_pointers(bias_ptr, head, row[:, None], column[None, :], WINDOW, HALO)
    exists = (row < T)[:, None] & (column < S)[None, :]
    bias = tl.load(entry, mask=exists, other=0.0).to(tl.float32) * LOG2E
    dbias = tl.zeros([QUERIES, KEYS], tl.float32)
    # sum of dS over the windows of the chunk
    for step in range(part * chunk, tl.minimum(part * chunk + chunk, total * batches)):
        batch, window = step // total, step % total
        _, where, keep, region = tile(window, rows, lengths, 1, QUERIES, WINDOW, SHIFT, NONE, NONE)
        _, key_where, key_keep, key_region = tile(window, columns, lengths, 1, KEYS, WINDOW, SHIFT, HALO, MARGIN)
        at = offset(where, lse_strides, WIDE)
        lse2 = tl.load(head_view(lse_ptr, lse_strides, batch, head) + at, mask=keep, other=float("inf")) * LOG2E
        delta = tl.load(head_view(delta_ptr, lse_strides, batch, head) + at, mask=keep, other=0.0)
        see = sees(region, key_region, key_keep, 1, QUERIES, KEYS, SHIFT)
        s = tl.zeros([QUERIES, KEYS], tl.float32)
        dp = tl.zeros([QUERIES, KEYS], tl.float32)
        # S and dP, a few features at a time
        for d in tl.range(0, LONGER, STEP):
            first = tl.cast(d, tl.int64)
            q_part, do_part = q_ptr + first * q_strides[5], do_ptr + first * do_strides[5]
            k_part, v_part = k_ptr + first * k_strides[5], v_ptr + first * v_strides[5]
            q = load(head_view(q_part, q_strides, batch, head), q_strides, where, keep, D - d, STEP, WIDE)
            k = load(head_view(k_part, k_strides, batch, key_head), k_strides, key_where, key_keep, D - d, STEP, WIDE)
            s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
            do = load(head_view(do_part, do_strides, batch, head), do_strides, where, keep, DV - d, STEP, WIDE)
            v = load(head_view(v_part, v_strides, batch, key_head), v_strides, key_where, key_keep, DV - d, STEP, WIDE)
            dp = tl.dot(do, tl.trans(v), dp, input_precision=PRECISION)
        p = tl.exp2(tl.where(see, s * (scale * LOG2E) + bias, float("-inf")) - lse2[:, None])
        dbias += p * (dp - delta[:, None])
    to = bias_pointers(partial_ptr, part * heads + head, row[:, None], column[None, :], WINDOW, HALO)
    tl.store(to, dbias, mask=exists)
