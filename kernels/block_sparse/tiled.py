"""Block-sparse attention in plain PyTorch: fast on CPU, right on any device, forward and backward.

Tokens are laid out box by box, so that what a box of queries attends to is a few long rows of memory. Boxes of queries
are then batches of small dense attentions. Chunks of them bound the keys, values and logits held at a time, and only
inputs, output and log-sum-exp are kept for the backward, so memory is linear in tokens.
"""

import math
from contextlib import nullcontext
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from .mask import BlockMask, boxes

LOG2_E = 1 / math.log(2)  # logits are in base 2: exp2 is cheaper than exp
LOGIT_BYTES = 1 << 20  # of one dense attention; what a chunk works on should stay in cache
CHUNK_BYTES = 4 << 20
COMPILED_CHUNKS = 8  # in a compiled graph, where the number of chunks must not depend on the number of tokens


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: BlockMask,
    scale: float,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, head_dim]` and natural log-sum-exp `[B, *spatial, heads]`; see `api`.

    Both are differentiable once; a second derivative raises RuntimeError.
    """
    blocks = tuple(mask.query_block), tuple(mask.key_block)
    lists = mask.kv_num, mask.kv_idx, mask.bias, mask.q_len, mask.kv_len
    return _Attention.apply(query, key, value, extra_key, extra_value, *lists, blocks, scale)


def _tracing() -> bool:
    return torch.compiler.is_compiling()


def _box(x: Tensor, block: tuple[int, ...], group: int, spare: int) -> Tensor:
    """`[B, *spatial, heads, d]` box by box, `[B * heads / group * boxes + spare, group * tokens, d]`.

    Tokens of `group` heads stand together, head by head. Zero past the grid and in the `spare` boxes at the end.
    """
    rank, (batch, *shape, heads, d) = x.dim() - 3, x.shape
    counts = boxes(shape, block)
    if any(n % b != 0 for n, b in zip(shape, block, strict=True)):
        ends = [c * b - n for n, b, c in zip(shape, block, counts, strict=True)]
        x = pad(x, [0, 0, 0, 0, *(side for end in reversed(ends) for side in (0, end))])
    x = x.view_as(x).unflatten(-2, (heads // group, group))
    for axis in reversed(range(rank)):
        x = x.unflatten(1 + axis, (counts[axis], block[axis]))  # [B, n0, b0, …, heads / group, group, d]
    order = [0, 2 * rank + 1, *range(1, 2 * rank, 2), 2 * rank + 2, *range(2, 2 * rank + 1, 2), 2 * rank + 3]
    rows, tokens = batch * (heads // group) * prod(counts), group * prod(block)
    out = x.new_empty(rows + spare, tokens, d)
    out[rows:] = 0
    out[:rows].view([x.shape[i] for i in order]).copy_(x.permute(order))
    return out


def _unbox(x: Tensor, shape: tuple[int, ...], block: tuple[int, ...], group: int) -> Tensor:
    """The inverse of `_box`: `[B * heads / group * boxes, group * tokens, d]` to a grid of `shape`."""
    batch, *lengths, heads, d = shape
    rank, counts = len(lengths), boxes(lengths, block)
    x = x.view(batch, heads // group, *counts, group, *block, d)
    order = [0, *(i for axis in range(rank) for i in (2 + axis, 3 + rank + axis)), 1, 2 + rank, 3 + 2 * rank]
    x = x.permute(order)  # [B, n0, b0, …, heads / group, group, d]
    for axis in range(rank):
        x = x.flatten(1 + axis, 2 + axis)
    for axis, n in enumerate(lengths):
        x = x.narrow(1 + axis, 0, n)
    return x.reshape(shape)


def _existing(shape, block: tuple[int, ...], length: Tensor | None, device: torch.device) -> Tensor | None:
    """Which tokens of each box exist, bool `[boxes, tokens]`; None when all do."""
    exists = None
    if any(n % b != 0 for n, b in zip(shape, block, strict=True)):
        exists = _box(torch.ones((1, *shape, 1, 1), dtype=torch.bool, device=device), block, 1, 0)[..., 0]
    if length is not None:
        within = torch.arange(prod(block), device=device) < length[:, None]
        exists = within if exists is None else exists & within
    return exists


class _Plan(NamedTuple):
    """Operands box by box, and what is needed to find the keys of a chunk of boxes of queries ("units").

    Unit `(b * lists + l) * query boxes + i` is box i of the `group` query heads that share list l and a key head.
    """

    query: Tensor  # [units, group * query tokens, d]
    key: Tensor  # [B * key heads * key boxes + 1, key tokens, d]; the last box is zero
    value: Tensor
    extra_key: Tensor | None  # [B * key heads, extra, d]
    extra_value: Tensor | None
    query_exists: Tensor | None  # [query boxes, query tokens]
    key_exists: Tensor | None  # [key boxes, key tokens]
    sizes: tuple[int, int, int, int]  # lists a batch entry, query boxes, key heads, key boxes
    group: int


class _Chunk(NamedTuple):
    units: slice
    boxes: Tensor  # [n * most], boxes of keys
    heads: Tensor  # [n], key heads of all batch entries
    added: Tensor | None  # [n, 1, keys + extra], to base-2 logits; -inf where no key is
    count: int  # keys of a unit without the extra ones


def _make_plan(query, key, value, extra_key, extra_value, kv_idx, q_len, kv_len, blocks) -> _Plan:
    heads, key_heads = query.shape[-2], key.shape[-2]
    lists = key_heads if kv_idx.shape[1] == 1 else heads
    group = heads // lists
    shapes = query.shape[1:-2], key.shape[1:-2]
    exists = [_existing(*x, query.device) for x in zip(shapes, blocks, (q_len, kv_len), strict=True)]
    q, k, v = _box(query, blocks[0], group, 0), _box(key, blocks[1], 1, 1), _box(value, blocks[1], 1, 1)
    query_boxes, key_boxes = (prod(boxes(s, b)) for s, b in zip(shapes, blocks, strict=True))
    if q_len is not None:  # what does not exist may hold anything, and zero times NaN is NaN
        q = _clear(q, exists[0], query_boxes, group)
    if kv_len is not None:
        k, v = (_clear(x, exists[1], key_boxes, 1) for x in (k, v))
    ek, ev = (x if x is None else x.transpose(1, 2).flatten(0, 1) for x in (extra_key, extra_value))
    return _Plan(q, k, v, ek, ev, *exists, (lists, query_boxes, key_heads, key_boxes), group)


def _clear(x: Tensor, exists: Tensor | None, count: int, group: int) -> Tensor:
    """Zero the tokens of boxes that do not exist."""
    rows = x.shape[0] // count * count
    inner = x[:rows].view(rows // count, count, group, x.shape[1] // group, x.shape[2])
    assert exists is not None
    inner.masked_fill_(~exists[:, None, :, None], 0)
    return x


def _chunks(plan: _Plan, kv_num: Tensor, kv_idx: Tensor, bias: Tensor | None, copies: int):
    """Chunks of units in order; `copies` of keys and logits are held at a time."""
    device, (units, rows, d), most = kv_idx.device, plan.query.shape, kv_idx.shape[-1]
    tokens, extra = plan.key.shape[1], 0 if plan.extra_key is None else plan.extra_key.shape[1]
    if _tracing():
        splits = COMPILED_CHUNKS
    else:
        if device.type == "cpu":  # looking at values costs nothing there
            most = int(kv_num.max()) if kv_num.numel() else 0
        keys = most * tokens + extra
        unit = copies * plan.key.element_size() * keys * (d + _rows_at_a_time(rows, keys))
        splits = max(1, min(units, math.ceil(units * unit / CHUNK_BYTES)))
    lists, query_boxes, key_heads, key_boxes = plan.sizes
    for i in range(splits):
        first, last = units * i // splits, units * (i + 1) // splits
        unit = torch.arange(first, last, device=device)
        batch, of, box = unit // query_boxes // lists, unit // query_boxes % lists, unit % query_boxes
        row = box
        if kv_idx.shape[1] > 1:
            row = row + of * query_boxes
        if kv_idx.shape[0] > 1:
            row = row + batch * (kv_idx.shape[1] * query_boxes)
        num = kv_num.reshape(-1).index_select(0, row)
        longest = most
        if not _tracing() and device.type == "cpu" and num.numel():
            longest = int(num.max())
        listed = torch.arange(longest, device=device) < num[:, None]  # [n, most]
        number = torch.where(listed, kv_idx.flatten(0, 2)[:, :longest].index_select(0, row), 0).long()
        head = batch * key_heads + of // (lists // key_heads)
        where = torch.where(listed, head[:, None] * key_boxes + number, plan.key.shape[0] - 1)
        values = None if bias is None else bias.flatten(0, 2)[:, :longest].index_select(0, row)
        added = _added(plan, listed, number, values, extra)
        yield _Chunk(slice(first, last), where.flatten(), head, added, longest * tokens)


def _added(plan: _Plan, listed: Tensor, number: Tensor, bias: Tensor | None, extra: int) -> Tensor | None:
    """What a chunk adds to its base-2 logits, `[n, 1, keys + extra]`, or None when that is nothing."""
    tokens = plan.key.shape[1]
    full = not _tracing() and listed.device.type == "cpu" and bool(listed.all())
    if full and bias is None and plan.key_exists is None:
        return None
    dtype = torch.promote_types(plan.key.dtype, torch.float32)
    seen = listed[..., None].expand(-1, -1, tokens)
    if plan.key_exists is not None:
        seen = seen & plan.key_exists[number]
    added = torch.zeros((), dtype=dtype, device=listed.device)
    if bias is not None:
        added = (bias.to(dtype) * LOG2_E)[..., None]
    added = torch.where(seen, added, -math.inf).flatten(1)
    return pad(added, (0, extra))[:, None]


def _rows_at_a_time(rows: int, keys: int) -> int:
    """Queries of a unit whose logits are held at a time: parts as even as can be."""
    if _tracing() or not rows:
        return rows
    parts = math.ceil(rows * max(keys, 1) * 4 / LOGIT_BYTES)
    return max(min(rows, 64), math.ceil(rows / parts))


def _take(x: Tensor, extra: Tensor | None, chunk: _Chunk) -> Tensor:
    """Keys or values of a chunk in the dtype of accumulation, `[n, keys + extra, d]`."""
    n = chunk.heads.shape[0]
    taken = x.index_select(0, chunk.boxes).view(n, chunk.count, x.shape[-1])
    if extra is not None:
        taken = torch.cat([taken, extra.index_select(0, chunk.heads)], 1)
    return taken.to(torch.promote_types(x.dtype, torch.float32))


def _logits(q: Tensor, k: Tensor, added: Tensor | None) -> Tensor:
    return torch.bmm(q, k.mT) if added is None else torch.baddbmm(added, q, k.mT)


def _hidden(plan: _Plan, shape: tuple[int, ...]) -> Tensor | None:
    """Queries of `[units, group * tokens]` that do not exist, or None."""
    if plan.query_exists is None:
        return None
    units, (count, tokens) = shape[0], plan.query_exists.shape
    hidden = ~plan.query_exists[None, :, None].expand(units // count, count, plan.group, tokens)
    return hidden.reshape(shape)


def _forward(plan: _Plan, kv_num, kv_idx, bias, scale: float) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp of units."""
    accumulate = torch.promote_types(plan.query.dtype, torch.float32)
    out, lse = torch.empty_like(plan.query), plan.query.new_empty(plan.query.shape[:2], dtype=accumulate)
    for chunk in _chunks(plan, kv_num, kv_idx, bias, 2):
        k, v = _take(plan.key, plan.extra_key, chunk), _take(plan.value, plan.extra_value, chunk)
        if k.shape[1] == 0:
            out[chunk.units], lse[chunk.units] = 0, -math.inf
            continue
        step = _rows_at_a_time(plan.query.shape[1], k.shape[1])
        for first in range(0, plan.query.shape[1], step) if not _tracing() else (0,):
            rows = (chunk.units, slice(first, first + step))
            logits = _logits(plan.query[rows].to(accumulate) * (scale * LOG2_E), k, chunk.added)
            highest = logits.amax(-1, keepdim=True)
            if chunk.added is not None:
                highest = highest.clamp_min_(torch.finfo(accumulate).min)  # where all is -inf
            weights = logits.sub_(highest).exp2_()
            total = weights.sum(-1, keepdim=True)
            lse[rows] = total.log2().add_(highest).mul_(1 / LOG2_E)[..., 0]
            out[rows] = torch.bmm(weights, v).div_(total + (total == 0)).to(out.dtype)
    hidden = _hidden(plan, lse.shape)
    if hidden is not None:
        out, lse = out.masked_fill_(hidden[..., None], 0), lse.masked_fill_(hidden, -math.inf)
    return out, lse


def _backward(plan: _Plan, kv_num, kv_idx, bias, scale: float, grad_out, lse, delta) -> tuple[Tensor | None, ...]:
    """Gradients of query (units), key, value (boxes), extra key and extra value; `delta` is rowsum(dO * O) - dlse."""
    accumulate = lse.dtype
    grad_query = torch.empty_like(plan.query)
    grads = [
        None if x is None else torch.zeros_like(x, dtype=accumulate)
        for x in (plan.key, plan.value, plan.extra_key, plan.extra_value)
    ]
    hidden = _hidden(plan, lse.shape)
    dead = lse == -math.inf if hidden is None else hidden | (lse == -math.inf)
    base = (lse * LOG2_E).masked_fill(dead, math.inf)  # the weights of queries that see nothing are zero
    for chunk in _chunks(plan, kv_num, kv_idx, bias, 4):
        k, v = _take(plan.key, plan.extra_key, chunk), _take(plan.value, plan.extra_value, chunk)
        sums = torch.zeros_like(k), torch.zeros_like(v)
        step = _rows_at_a_time(plan.query.shape[1], k.shape[1])
        for first in range(0, plan.query.shape[1], step) if not _tracing() else (0,):
            rows = (chunk.units, slice(first, first + step))
            q = plan.query[rows].to(accumulate) * (scale * LOG2_E)
            grad = grad_out[rows].to(accumulate)
            weights = _logits(q, k, chunk.added).sub_(base[rows][..., None]).exp2_()
            sums[1].baddbmm_(weights.mT, grad)
            slope = torch.bmm(grad, v.mT).sub_(delta[rows][..., None]).mul_(weights)
            sums[0].baddbmm_(slope.mT, q)
            grad_query[rows] = torch.bmm(slope, k).mul_(scale).to(grad_query.dtype)
        for total, box_grad, extra_grad in zip(sums, grads[:2], grads[2:], strict=True):
            assert box_grad is not None
            box_grad.index_add_(0, chunk.boxes, total[:, : chunk.count].reshape(-1, *box_grad.shape[1:]))
            if extra_grad is not None:
                extra_grad.index_add_(0, chunk.heads, total[:, chunk.count :])
    for grad in grads[::2]:
        if grad is not None:
            grad.mul_(1 / LOG2_E)
    return grad_query, *grads


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, extra_key, extra_value, kv_num, kv_idx, bias, q_len, kv_len, blocks, scale):
        plan = _make_plan(query, key, value, extra_key, extra_value, kv_idx, q_len, kv_len, blocks)
        out, lse = _forward(plan, kv_num, kv_idx, bias, scale)
        out = _unbox(out, query.shape, blocks[0], plan.group)
        lse = _unbox(lse[..., None], (*query.shape[:-1], 1), blocks[0], plan.group)[..., 0]
        ctx.save_for_backward(query, key, value, extra_key, extra_value, kv_num, kv_idx, bias, q_len, kv_len, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        device = grad_out.device.type
        cast = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if cast else nullcontext():  # as in the forward
            return *_Attention._gradients(ctx, grad_out, grad_lse), *(None,) * 7

    @staticmethod
    def _gradients(ctx, grad_out, grad_lse):
        query, key, value, extra_key, extra_value, kv_num, kv_idx, bias, q_len, kv_len, out, lse = ctx.saved_tensors
        blocks = ctx.blocks
        plan = _make_plan(query, key, value, extra_key, extra_value, kv_idx, q_len, kv_len, blocks)
        delta = (grad_out.to(lse.dtype) * out).sum(-1) - grad_lse
        boxed = (_box(x[..., None], blocks[0], plan.group, 0)[..., 0] for x in (lse, delta))
        grad_out = _box(grad_out, blocks[0], plan.group, 0)
        grads = _backward(plan, kv_num, kv_idx, bias, ctx.scale, grad_out, *boxed)
        grad_query = _unbox(grads[0], query.shape, blocks[0], plan.group)
        grad_key, grad_value = (_unbox(x[:-1], key.shape, blocks[1], 1).to(key.dtype) for x in grads[1:3])
        extras = (
            None if x is None else x.unflatten(0, (key.shape[0], key.shape[-2])).transpose(1, 2).to(key.dtype)
            for x in grads[3:]
        )
        return grad_query, grad_key, grad_value, *extras
