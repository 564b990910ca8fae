"""Block-sparse attention in plain PyTorch: fast on CPU, right on any device, forward and backward.

Tokens are laid out block by block, so that what a block of queries attends to is a few long rows of memory. Blocks of
queries are then batches of small dense attentions: PyTorch's fused one on CPU where it serves, else two products and a
softmax. Chunks of them bound the keys, values and logits held at a time, and only inputs, output and log-sum-exp are
kept for the backward, so memory is linear in tokens.
"""

import math
from collections.abc import Iterator, Sequence
from math import prod
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from ..common import fused
from ..common.calling import without_autocast
from ..common.symbolic import exporting
from . import gathered
from .call import BlockSparseCall, empty_kept
from .mask import BlockMask, boxes, by_entry, by_head, divides, listed
from .skip import margins, without_skipped

LOG2_E = 1 / math.log(2)  # logits are in base 2: exp2 is cheaper than exp
LOGIT_BYTES = 1 << 20  # of one dense attention; what a chunk works on should stay in cache
CHUNK_BYTES = 2 << 20, 4 << 20  # the least and the most
FUSED_BYTES = 2 << 20  # of keys, values and their gradients, for each thread
FUSED_ROWS = 32  # queries of a unit from which it is faster
PART_BYTES = 4 << 20  # laid out block by block at a time,
PART_RATIO = 1 / 8  # or this much of query, key and value if that is more
COMPILED_PARTS = 8  # at most, of heads: in a compiled graph nothing may depend on the number of tokens


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: BlockSparseCall,
) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, value_dim]` and natural log-sum-exp `[B, *spatial, heads]`; see `api`.

    Both are differentiable once; a second derivative raises RuntimeError.
    """
    if exporting():
        return gathered.attend(query, key, value, call)
    return _Attention.apply(query, key, value, *call.additional, *call.mask[:7], call.scale, call.skip_threshold)


class _Operands(NamedTuple):
    """Tensors of a call, or those of some of its batch entries and heads."""

    query: Tensor
    key: Tensor
    value: Tensor
    additional_keys: Tensor | None
    additional_values: Tensor | None
    kv_num: Tensor
    kv_idx: Tensor
    bias: Tensor | None
    q_len: Tensor | None
    kv_len: Tensor | None
    additional_mask: Tensor | None


def _tracing() -> bool:
    return torch.compiler.is_compiling()


def _parts(x: _Operands) -> list[tuple[slice, slice]]:
    """Batch entries and key heads that are laid out block by block at a time."""
    batch, key_heads = x.key.shape[0], x.key.shape[-2]
    if _tracing():
        parts = min(index(key_heads), COMPILED_PARTS)
        return [(slice(None), slice(key_heads * i // parts, key_heads * (i + 1) // parts)) for i in range(parts)]
    if not batch:
        return [(slice(None), slice(0, key_heads))]
    total = (x.query.numel() + x.key.numel() + x.value.numel()) * x.query.itemsize
    most = max(1, int(max(PART_BYTES, PART_RATIO * total) / total * batch * key_heads))  # pairs of entry and head
    entries, heads = max(1, most // key_heads), min(most, key_heads)
    return [
        (slice(b, min(b + entries, batch)), slice(h, min(h + heads, key_heads)))
        for b in range(0, batch, entries)
        for h in range(0, key_heads, heads)
    ]


def _heads(x: Tensor, batch: slice, heads: slice, key_heads: int) -> Tensor:
    """The entries and query heads of `[B, …, heads, d]` that belong to key heads."""
    group = x.shape[-2] // key_heads
    return x[batch][..., heads.start * group : heads.stop * group, :]


def _select(x: _Operands, batch: slice, heads: slice) -> _Operands:
    """The operands of some batch entries and key heads."""
    key_heads = x.key.shape[-2]
    grids = (None if t is None else _heads(t, batch, heads, key_heads) for t in x[:5])

    def lists(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        group = t.shape[1] // key_heads
        t = t if t.shape[0] == 1 else t[batch]
        return t if t.shape[1] == 1 else t[:, heads.start * group : heads.stop * group]

    def entries(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.shape[0] == 1 else t[batch]

    lengths = (None if t is None else entries(by_entry(t)) for t in (x.q_len, x.kv_len))
    visible = None if x.additional_mask is None else x.additional_mask[batch]
    return _Operands(*grids, *map(lists, x[5:8]), *lengths, visible)  # pyright: ignore[reportCallIssue]


def _cut(x: Tensor, block: tuple[int, ...], group: int) -> Tensor:
    """View of a grid that the blocks divide: `[B, heads / group, *blocks, group, *block, d]`."""
    rank, (*_, heads, _) = x.dim() - 3, x.shape
    x = x.unflatten(-2, (heads // group, group))
    for axis in reversed(range(rank)):
        x = x.unflatten(1 + axis, (x.shape[1 + axis] // block[axis], block[axis]))
    order = [0, 2 * rank + 1, *range(1, 2 * rank, 2), 2 * rank + 2, *range(2, 2 * rank + 1, 2), 2 * rank + 3]
    return x.permute(order)


def _box(x: Tensor, block: tuple[int, ...], group: int, spare: int) -> Tensor:
    """`[B, *spatial, heads, d]` block by block, `[B * heads / group * blocks + spare, group * tokens, d]`.

    Tokens of `group` heads stand together, head by head. Zero past the grid and in the `spare` blocks at the end.
    """
    batch, *shape, heads, d = x.shape
    counts = boxes(shape, block)
    if not divides(shape, block):
        ends = [c * b - n for n, b, c in zip(shape, block, counts, strict=True)]
        x = pad(x, [0, 0, 0, 0, *(side for end in reversed(ends) for side in (0, end))])
    rows, tokens = batch * (heads // group) * prod(counts), group * prod(block)
    out = x.new_empty(rows + spare, tokens, d)
    out[rows:] = 0
    cut = _cut(x, block, group)
    out[:rows].view(cut.shape).copy_(cut)
    return out


def _unbox(x: Tensor, target: Tensor, block: tuple[int, ...], group: int) -> None:
    """The inverse of `_box`, into a grid: x is `[B * heads / group * blocks, group * tokens, d]`."""
    batch, *shape, heads, d = target.shape
    rank, counts = len(shape), boxes(shape, block)
    x = x.view(batch, heads // group, *counts, group, *block, d)
    if divides(shape, block):
        _cut(target, block, group).copy_(x)
        return
    order = [0, *(i for axis in range(rank) for i in (2 + axis, 3 + rank + axis)), 1, 2 + rank, 3 + 2 * rank]
    x = x.permute(order).flatten(-3, -2)  # [B, n0, b0, …, heads, d]
    for axis in range(rank):
        x = x.flatten(1 + axis, 2 + axis)
    for axis, n in enumerate(shape):
        x = x.narrow(1 + axis, 0, n)
    target.copy_(x)


def _existing(shape, block: tuple[int, ...], length: Tensor | None, device: torch.device) -> Tensor | None:
    """True for tokens of a block that exist, bool `[B or 1, blocks, tokens]`; None when all do."""
    exists = None
    if not divides(shape, block):
        exists = _box(torch.ones((1, *shape, 1, 1), dtype=torch.bool, device=device), block, 1, 0)[None, ..., 0]
    if length is not None:
        within = torch.arange(prod(block), device=device) < length[..., None]
        exists = within if exists is None else exists & within
    return exists


class _Plan(NamedTuple):
    """Operands block by block, and what is needed to find the keys of a chunk of blocks of queries ("units").

    Unit `(b * lists + l) * query blocks + i` is block i of the `group` query heads that share list l and a key head.
    """

    query: Tensor  # [units, group * query tokens, d], as wide as keys
    key: Tensor  # [B * key heads * key blocks + 1, key tokens, d]; the last block is zero
    value: Tensor
    additional_keys: Tensor | None  # [B * key heads, extra, d]
    additional_values: Tensor | None
    additional_mask: Tensor | None  # [B, extra]
    query_exists: Tensor | None  # [B or 1, query blocks, query tokens]
    key_exists: Tensor | None  # [B or 1, key blocks, key tokens]
    sizes: tuple[int, int, int, int]  # lists a batch entry, query blocks, key heads, key blocks
    group: int


class _Chunk(NamedTuple):
    units: slice
    boxes: Tensor  # [n * most], blocks of keys
    heads: Tensor  # [n], key heads of all batch entries
    added: Tensor | None  # [n, 1, keys + extra], to base-2 logits; -inf where no key is
    count: int  # keys of a unit without the extra ones


def _make_plan(x: _Operands, blocks: tuple[tuple[int, ...], tuple[int, ...]]) -> _Plan:
    heads, key_heads = x.query.shape[-2], x.key.shape[-2]
    lists = key_heads if x.kv_idx.shape[1] in (1, key_heads) else heads
    group = heads // lists
    shapes = x.query.shape[1:-2], x.key.shape[1:-2]
    query_exists = _existing(shapes[0], blocks[0], x.q_len, x.query.device)
    key_exists = _existing(shapes[1], blocks[1], x.kv_len, x.query.device)
    q, k, v = _box(x.query, blocks[0], group, 0), _box(x.key, blocks[1], 1, 1), _box(x.value, blocks[1], 1, 1)
    query_boxes, key_boxes = (prod(boxes(s, b)) for s, b in zip(shapes, blocks, strict=True))
    if x.q_len is not None:  # what does not exist may hold anything, and zero times NaN is NaN
        q = _clear(q, query_exists, group)
    if x.kv_len is not None:
        k, v = _clear(k, key_exists, 1), _clear(v, key_exists, 1)
    extras = x.additional_keys, x.additional_values
    if x.additional_mask is not None:  # masked tokens may hold anything
        hidden = ~x.additional_mask[..., None, None]
        extras = [None if e is None else e.masked_fill(hidden, 0) for e in extras]
    ek, ev = (None if e is None else e.transpose(1, 2).flatten(0, 1) for e in extras)
    return _Plan(
        q, k, v, ek, ev, x.additional_mask, query_exists, key_exists, (lists, query_boxes, key_heads, key_boxes), group
    )


def _clear(x: Tensor, exists: Tensor | None, group: int) -> Tensor:
    """Zero the tokens of blocks that do not exist."""
    assert exists is not None
    (entries, count, tokens), d = exists.shape, x.shape[2]
    copies = x.shape[0] // count // max(entries, 1)  # of the blocks of an entry, or of all entries
    inner = x[: entries * copies * count].view(entries, copies, count, group, tokens, d)
    inner.masked_fill_(~exists[:, None, :, None, :, None], 0)
    return x


def _is_fused(plan: _Plan) -> bool:
    """Return whether PyTorch's fused attention, which is one for CPU, computes the units."""
    if _tracing() or plan.query.device.type != "cpu" or plan.query.shape[-1] != plan.value.shape[-1]:
        return False
    return plan.query.shape[1] >= FUSED_ROWS and plan.query.shape[-1] > 0


def _splits(plan: _Plan, most: int, copies: int, whole: bool) -> int:
    """Into how many chunks units are split, of which `copies` of keys and logits are held at a time.

    Args:
        whole: units are computed by fused attention, which holds no logits.
    """
    (units, rows, d), size = plan.query.shape, plan.key.element_size()
    keys = most * plan.key.shape[1] + (0 if plan.additional_keys is None else plan.additional_keys.shape[1])
    room = (plan.query.numel() + plan.key.numel() + plan.value.numel()) * size // 4
    unit = copies * size * keys * max(d, plan.value.shape[-1])
    if whole:  # fused attention shares units out among threads
        threads = torch.get_num_threads()
        many = threads * FUSED_BYTES // max(unit, 1) // threads * threads
        return math.ceil(units / max(threads, many))
    unit += copies * size * keys * _rows_at_a_time(rows, keys)
    return max(1, min(units, math.ceil(units * unit / min(max(CHUNK_BYTES[0], room), CHUNK_BYTES[1]))))


def _chunks(
    plan: _Plan, kv_num: Tensor, kv_idx: Tensor, bias: Tensor | None, copies: int, whole: bool = False
) -> Iterator[_Chunk]:
    """Chunks of units in order; see `_splits`."""
    device, units, look = kv_idx.device, plan.query.shape[0], not _tracing() and kv_idx.device.type == "cpu"
    lists, query_boxes, key_heads, key_boxes = plan.sizes
    most = int(kv_num.max()) if look and kv_num.numel() else kv_idx.shape[-1]  # looking at values costs nothing on CPU
    batch = units // (lists * query_boxes)

    def by_unit(x: Tensor) -> Tensor:  # [units, most]
        return x.expand(batch, lists, -1, -1).flatten(0, 2)

    num, idx = by_unit(kv_num[..., None]), by_unit(kv_idx[..., :most])
    values = None if bias is None else by_unit(bias[..., :most])
    head = torch.arange(batch * lists, device=device)
    head = (head // lists * key_heads + head % lists // (lists // key_heads)).repeat_interleave(query_boxes)
    if most > kv_idx.shape[-1]:
        raise ValueError(f"mask.kv_num holds {most}; lists have {kv_idx.shape[-1]} entries")
    listed = torch.arange(most, device=device) < num
    unmasked = bias is None and plan.key_exists is None and plan.additional_mask is None
    full = look and unmasked and bool(listed.all())
    number = torch.where(listed, idx, 0).long()
    if look and number.numel() and not 0 <= int(number.min()) <= int(number.max()) < key_boxes:
        raise ValueError(f"mask.kv_idx lists boxes {int(number.min())} to {int(number.max())}; there are {key_boxes}")
    where = torch.where(listed, head[:, None] * key_boxes + number, plan.key.shape[0] - 1)
    splits = 1 if _tracing() else _splits(plan, most, copies, whole)
    for i in range(splits):
        part = slice(units * i // splits, units * (i + 1) // splits) if splits > 1 else slice(None)
        longest = int(num[part].max()) if look and not full and units else most
        added = None
        if not full and not (look and unmasked and listed[part, :longest].all()):
            chosen = None if values is None else values[part, :longest]
            added = _added(plan, listed[part, :longest], number[part, :longest], chosen, head[part])
        yield _Chunk(part, where[part, :longest].flatten(), head[part], added, longest * plan.key.shape[1])


def _added(plan: _Plan, listed: Tensor, number: Tensor, bias: Tensor | None, heads: Tensor) -> Tensor:
    """Bias and mask of a chunk, added to its base-2 logits, `[n, 1, keys + extra]`."""
    dtype = torch.promote_types(plan.key.dtype, torch.float32)
    seen = listed[..., None].expand(-1, -1, plan.key.shape[1])
    if plan.key_exists is not None:
        blocks = number
        if plan.key_exists.shape[0] > 1:
            blocks = blocks + (heads // plan.sizes[2] * plan.key_exists.shape[1])[:, None]
        seen = seen & plan.key_exists.flatten(0, 1)[blocks]
    added = torch.zeros((), dtype=dtype, device=listed.device) if bias is None else (bias.to(dtype) * LOG2_E)[..., None]
    added = torch.where(seen, added, -math.inf).flatten(1)
    if plan.additional_mask is not None:
        visible = plan.additional_mask.index_select(0, heads // plan.sizes[2])  # of the batch entry
        return torch.cat([added, torch.where(visible, 0.0, -math.inf).to(dtype)], 1)[:, None]
    return pad(added, (0, 0 if plan.additional_keys is None else plan.additional_keys.shape[1]))[:, None]


def _rows_at_a_time(rows: int, keys: int) -> int:
    """Queries of a unit whose logits are held at a time: parts as even as can be."""
    parts = math.ceil(rows * max(keys, 1) * 4 / LOGIT_BYTES)
    return max(min(rows, 64), math.ceil(rows / parts))


def _take(x: Tensor, extra: Tensor | None, chunk: _Chunk) -> Tensor:
    """Keys or values of a chunk in the dtype of accumulation, `[n, keys + extra, d]`."""
    n = chunk.heads.shape[0]
    taken = x.index_select(0, chunk.boxes).view(n, chunk.count, x.shape[-1])
    if extra is not None:
        taken = torch.cat([taken, extra.index_select(0, chunk.heads)], 1)
    return taken.to(torch.promote_types(x.dtype, torch.float32))


def _row_slices(rows: int, keys: int) -> list[slice]:
    if _tracing():
        return [slice(None)]
    step = _rows_at_a_time(rows, keys)
    return [slice(first, first + step) for first in range(0, rows, step)]


def _logits(q: Tensor, k: Tensor, added: Tensor | None) -> Tensor:
    return torch.bmm(q, k.mT) if added is None else torch.baddbmm(added, q, k.mT)


def _hidden(plan: _Plan, shape: tuple[int, ...]) -> Tensor | None:
    """Queries of `[units, group * tokens]` that do not exist, or None."""
    if plan.query_exists is None:
        return None
    lists, count, *_ = plan.sizes
    batch, tokens = shape[0] // (lists * count), plan.query_exists.shape[-1]
    hidden = ~plan.query_exists[:, None, :, None].expand(batch, lists, count, plan.group, tokens)
    return hidden.reshape(shape)


def _forward(plan: _Plan, kv_num, kv_idx, bias, scale: float) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp of units."""
    accumulate = torch.promote_types(plan.query.dtype, torch.float32)
    rows = plan.query.shape[:2]
    out, lse = plan.query.new_empty(*rows, plan.value.shape[-1]), plan.query.new_empty(rows, dtype=accumulate)
    whole = _is_fused(plan)
    for chunk in _chunks(plan, kv_num, kv_idx, bias, 2, whole):
        k, v = _take(plan.key, plan.additional_keys, chunk), _take(plan.value, plan.additional_values, chunk)
        if k.shape[1] == 0:
            out[chunk.units], lse[chunk.units] = 0, -math.inf
            continue
        if whole:
            q = plan.query[chunk.units].to(accumulate)
            unit_out, unit_lse = fused.forward(q[:, None], k[:, None], v[:, None], mask=_natural(chunk), scale=scale)
            out[chunk.units] = unit_out[:, 0].to(out.dtype)
            lse[chunk.units] = unit_lse[:, 0]
            if chunk.added is not None:
                lse[chunk.units].masked_fill_((chunk.added == -math.inf).all(-1), -math.inf)
            continue
        for part in _row_slices(plan.query.shape[1], k.shape[1]):
            rows = (chunk.units, part)
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


def _natural(chunk: _Chunk) -> Tensor | None:
    """What is added to natural logits, `[n, 1, 1, keys + extra]`."""
    return None if chunk.added is None else chunk.added[:, None] / LOG2_E


def _backward(
    plan: _Plan, kv_num, kv_idx, bias, scale: float, grad_out, lse, grad_lse, out: Tensor | None = None
) -> list:
    """Gradients of query (units), key, value (blocks), extra key and extra value.

    Args:
        out: output of the units where the log-sum-exp has no gradient and fused attention computes them, else None.
    """
    accumulate = lse.dtype
    grad_query = torch.empty_like(plan.query)
    grads = [
        None if x is None else torch.zeros_like(x, dtype=accumulate)
        for x in (plan.key, plan.value, plan.additional_keys, plan.additional_values)
    ]
    hidden = _hidden(plan, lse.shape)
    dead = lse == -math.inf if hidden is None else hidden | (lse == -math.inf)
    lse = lse.masked_fill(dead, math.inf)  # the weights of queries that see nothing are zero
    for chunk in _chunks(plan, kv_num, kv_idx, bias, 4, out is not None):
        k, v = _take(plan.key, plan.additional_keys, chunk), _take(plan.value, plan.additional_values, chunk)
        if out is None:
            sums = _plain_backward(plan, chunk, k, v, scale, grad_out, lse, grad_lse, grad_query)
        else:
            sums = _fused_backward(plan, chunk, k, v, scale, grad_out, lse, out, grad_query)
        for total, box_grad, extra_grad in zip(sums, grads[:2], grads[2:], strict=True):
            assert box_grad is not None
            box_grad.index_add_(0, chunk.boxes, total[:, : chunk.count].reshape(-1, *box_grad.shape[1:]))
            if extra_grad is not None:
                extra_grad.index_add_(0, chunk.heads, total[:, chunk.count :])
    return [grad_query, *grads]


def _plain_backward(
    plan: _Plan, chunk: _Chunk, k: Tensor, v: Tensor, scale: float, grad_out, lse, grad_lse, grad_query: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the keys and values of a chunk; those of its queries go into `grad_query`."""
    of_keys, of_values = torch.zeros_like(k), torch.zeros_like(v)
    for part in _row_slices(plan.query.shape[1], k.shape[1]):
        rows = (chunk.units, part)
        q = plan.query[rows].to(lse.dtype) * scale
        grad = grad_out[rows].to(lse.dtype)
        weights = _logits(q * LOG2_E, k, chunk.added).sub_((lse[rows] * LOG2_E)[..., None]).exp2_()
        of_values.baddbmm_(weights.mT, grad)
        slope = torch.bmm(grad, v.mT).mul_(weights)
        mean = slope.sum(-1, keepdim=True).sub_(grad_lse[rows][..., None])
        slope.addcmul_(weights, mean, value=-1)
        of_keys.baddbmm_(slope.mT, q)
        grad_query[rows] = torch.bmm(slope, k).mul_(scale).to(grad_query.dtype)
    return of_keys, of_values


def _fused_backward(
    plan: _Plan, chunk: _Chunk, k: Tensor, v: Tensor, scale: float, grad_out, lse, out: Tensor, grad_query: Tensor
) -> tuple[Tensor, Tensor]:
    """As `_plain_backward`, where the log-sum-exp has no gradient."""
    if not k.shape[1]:
        grad_query[chunk.units] = 0
        return torch.zeros_like(k), torch.zeros_like(v)
    grad, q, units = (x[chunk.units].to(lse.dtype)[:, None] for x in (grad_out, plan.query, out))
    sums, mask = lse[chunk.units][:, None], _natural(chunk)
    of_query, of_keys, of_values = fused.backward(grad, q, k[:, None], v[:, None], units, sums, mask=mask, scale=scale)
    grad_query[chunk.units] = of_query[:, 0].to(grad_query.dtype)
    return of_keys[:, 0], of_values[:, 0]


def _operands(query: Tensor, key: Tensor, value: Tensor, call: BlockSparseCall) -> _Operands:
    mask = call.mask
    return _Operands(
        query,
        key,
        value,
        call.additional_keys,
        call.additional_values,
        mask.kv_num,
        mask.kv_idx,
        mask.bias,
        mask.q_len,
        mask.kv_len,
        call.additional_mask,
    )


def block_margins(query: Tensor, key: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Base-2 `skip.margins` of all listed blocks, `[B, heads, query blocks, most]`; anything where none is listed."""
    accumulate = torch.promote_types(query.dtype, torch.float32)
    operands = _operands(query, key, key, BlockSparseCall(None, None, mask, scale))
    shape = query.shape[0], query.shape[-2], *mask.kv_idx.shape[2:]
    found = torch.zeros(shape, dtype=accumulate, device=query.device)
    for batch, heads in _parts(operands):
        x = _select(operands, batch, heads)
        plan = _make_plan(x, (mask.query_block, mask.key_block))
        above = _margins(plan, x.kv_num, x.kv_idx, x.bias, scale)  # [units, group, most]
        lists, count, *_ = plan.sizes
        above = above.view(-1, lists, count, plan.group, shape[-1]).transpose(2, 3).flatten(1, 2)
        group = shape[1] // key.shape[-2]
        found[batch, heads.start * group : heads.stop * group] = above
    return found


def _margins(plan: _Plan, kv_num: Tensor, kv_idx: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    units, rows, _ = plan.query.shape
    accumulate = torch.promote_types(plan.query.dtype, torch.float32)
    found = torch.zeros(units, plan.group, kv_idx.shape[-1], dtype=accumulate, device=kv_idx.device)
    for chunk in _chunks(plan, kv_num, kv_idx, bias, 2):
        k, length = _take(plan.key, None, chunk), chunk.count // plan.key.shape[1]
        if not length:
            continue
        highest = []
        for part in _row_slices(rows, chunk.count):
            logits = _logits(plan.query[chunk.units, part].to(accumulate) * (scale * LOG2_E), k, chunk.added)
            highest.append(logits.unflatten(-1, (length, -1)).amax(-1))
        of_query = torch.cat(highest, 1).unflatten(1, (plan.group, -1))  # [n, group, tokens, length]
        exists = plan.query_exists
        if exists is not None:
            lists, count, *_ = plan.sizes
            unit = torch.arange(units, device=exists.device)[chunk.units]
            entry = unit // (lists * count) if exists.shape[0] > 1 else 0
            exists = exists[entry, unit % count, None]
        found[chunk.units, :, :length] = margins(of_query, exists)
    return found


def _kept(query: Tensor, key: Tensor, call: BlockSparseCall) -> Tensor:
    """Listed blocks that are not skipped, as `call.empty_kept` holds them."""
    if call.skip_threshold is None:
        return empty_kept(query, call)
    below = block_margins(query, key, call.mask, call.scale) < math.log2(call.skip_threshold)
    of_list = by_head(listed(call.mask.kv_num, call.mask.kv_idx), query.shape[-2])
    return (~below & of_list).to(torch.uint8)


def forward(query: Tensor, key: Tensor, value: Tensor, call: BlockSparseCall) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, *spatial, heads, value_dim]`, log-sum-exp `[B, *spatial, heads]` and the blocks that are kept."""
    kept = _kept(query, key, call)
    call = without_skipped(call, kept)
    operands, key_heads = _operands(query, key, value, call), key.shape[-2]
    block = call.mask.query_block, call.mask.key_block
    out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
    lse = out.new_empty(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))
    for part in _parts(operands):
        x = _select(operands, *part)
        plan = _make_plan(x, block)
        part_out, part_lse = _forward(plan, x.kv_num, x.kv_idx, x.bias, call.scale)
        _unbox(part_out, _heads(out, *part, key_heads), block[0], plan.group)
        _unbox(part_lse[..., None], _heads(lse[..., None], *part, key_heads), block[0], plan.group)
    return out, lse, kept


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outputs: tuple[Tensor | None, Tensor, Tensor] | Sequence[Tensor],
    gradients: Sequence[Tensor],
    call: BlockSparseCall,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, additional keys and values, None where not given."""
    (out, lse, kept), (grad_out, grad_lse) = outputs, gradients
    call = without_skipped(call, kept)
    operands, key_heads = _operands(query, key, value, call), key.shape[-2]
    block = call.mask.query_block, call.mask.key_block
    grads = [
        None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (query, key, value, call.additional_keys, call.additional_values)
    ]
    for part in _parts(operands):
        x = _select(operands, *part)
        plan = _make_plan(x, block)
        whole = out is not None and _is_fused(plan) and not grad_lse[part[0]].any()
        grad, base, sub, *output = (
            _box(_heads(t, *part, key_heads), block[0], plan.group, 0)
            for t in (grad_out, lse[..., None], grad_lse[..., None], *([out] if out is not None and whole else []))
        )
        found = _backward(plan, x.kv_num, x.kv_idx, x.bias, call.scale, grad, base[..., 0], sub[..., 0], *output)
        to: list = [None if g is None else _heads(g, *part, key_heads) for g in grads]
        _unbox(found[0], to[0], block[0], plan.group)
        for total, target in zip(found[1:3], to[1:3], strict=True):
            _unbox(total[:-1], target, block[1], 1)
        for total, target in zip(found[3:], to[3:], strict=True):
            if target is not None:
                target.copy_(total.unflatten(0, (-1, target.shape[-2])).transpose(1, 2))
    return tuple(grads)


class _Attention(torch.autograd.Function):
    """The gradient by `backward`; tensors that a call may lack are None."""

    @staticmethod
    def forward(ctx, query, key, value, additional_keys, additional_values, additional_mask, *mask_and_numbers):
        *mask, ctx.scale, ctx.skip_threshold = mask_and_numbers
        ctx.query_block, ctx.key_block, *lists = mask
        call = BlockSparseCall(
            additional_keys, additional_values, BlockMask(*mask), ctx.scale, additional_mask, ctx.skip_threshold
        )
        out, lse, kept = forward(query, key, value, call)
        saved = (query, key, value, additional_keys, additional_values, additional_mask, out, lse, kept)
        ctx.save_for_backward(*saved, *lists)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        query, key, value, keys, values, visible, out, lse, kept, *lists = ctx.saved_tensors
        mask = BlockMask(ctx.query_block, ctx.key_block, *lists)
        call = BlockSparseCall(keys, values, mask, ctx.scale, visible, ctx.skip_threshold)
        with without_autocast(grad_out.device):  # as in the forward
            grads = backward(query, key, value, (out, lse, kept), (grad_out, grad_lse), call, (True, True))
        return *grads, *(None,) * 10
