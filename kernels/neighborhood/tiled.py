"""Neighborhood attention in plain PyTorch: fast on CPU, right on any device, forward and backward.

Queries are cut into small tiles of neighbours. A tile gathers the box of keys that its windows cover and is then one
small dense attention; all tiles of a chunk go through one batched product. Only inputs, output and log-sum-exp are kept
for the backward, which gathers again, and chunks bound what is gathered at a time, so memory is linear in tokens.
"""

import math
from collections.abc import Sequence
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from ..common.calling import tracing, without_autocast
from ..common.symbolic import known, plain
from . import tiled_plan
from .call import NeighborhoodCall
from .geometry import Axis, query_count
from .tiled_plan import Chunk, Plan, Sizes, Slab

LOG2_E = 1 / math.log(2)  # logits are in base 2: exp2 is cheaper than exp
CACHE_BYTES = 6 << 20  # what a chunk works on should stay in cache
MEMORY_RATIO = 1.75  # and be no more than this many times query, key, value and output,
SMALL_BYTES = 4 << 20  # unless it is as little as this: the thirty calls of a chunk take longer than a small map
COMPILED_RATIO = 12  # chunks are unrolled in a compiled graph: small windows must do with one


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: NeighborhoodCall,
) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, value dim]` and natural log-sum-exp `[B, *spatial, heads]`; see `api.na2d`.

    Both are differentiable once; a second derivative raises RuntimeError.
    """
    tensors = call.bias, call.additional_keys, call.additional_values, call.additional_mask
    return _Attention.apply(query, key, value, *tensors, call.axes, call.scale)


class _Rows(NamedTuple):
    """Inputs as rows of head_dim numbers, extra keys after those of the grid."""

    query: Tensor  # [B * tokens * heads, d]
    key: Tensor  # [(B * tokens + B * extra) * key heads, d]
    value: Tensor  # as many rows, of the value's own width
    hidden: Tensor | None  # [B * extra] extra keys that are masked
    sizes: Sizes


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    additional_mask: Tensor | None,
) -> _Rows:
    d, hidden = query.shape[-1], None
    k, v = key.reshape(-1, d), value.reshape(-1, value.shape[-1])
    if additional_keys is not None and additional_values is not None:
        extras = (additional_keys, additional_values)
        if additional_mask is not None:  # masked tokens may hold anything
            extras = [x.masked_fill(~additional_mask[..., None, None], 0) for x in extras]
            hidden = ~additional_mask.flatten()
        k, v = (torch.cat([x, extra.reshape(-1, x.shape[-1])]) for x, extra in zip((k, v), extras, strict=True))
    # A box holds values that a query must not see, and zero times NaN is NaN: the values are made finite, and the keys
    # of those that were not become NaN, which masks keep out. On CPU it costs nothing to look whether it is needed.
    accumulate = _accumulate(v)
    if tracing() or v.device.type != "cpu" or not math.isfinite(v.sum(dtype=accumulate).item()):
        total = v.sum(-1, keepdim=True, dtype=accumulate)
        k, v = k + (total - total).to(k.dtype), v.nan_to_num()
    key_heads = index(key.shape[-2])
    sizes = Sizes(query.shape[0], key_heads, index(query.shape[-2]) // key_heads)
    return _Rows(query.reshape(-1, d), k, v, hidden, sizes)


def _width(query: Tensor, value: Tensor) -> int:
    """Features of a head, on average over query and key, and value and output."""
    return index(query.shape[-1] + value.shape[-1] + 1) // 2


def _known_axis(axis: Axis) -> tuple[int, int, bool, int, int]:
    """Facts of an axis that choose a cut: its lengths are 0 where they are symbols."""
    n = tiled_plan.positions(axis)
    length = axis.window if known(axis.window == n) else plain(n)
    return axis.window, axis.stride, axis.causal, length, index(tiled_plan.query_positions(axis)) if axis.queries else 0


def _make_plan(
    query: Tensor, key: Tensor, value: Tensor, additional_keys: Tensor | None, axes: tuple[Axis, ...]
) -> Plan:
    extra = 0 if additional_keys is None else additional_keys.shape[1]
    group, d = index(query.shape[-2] // key.shape[-2]), _width(query, value)
    if tracing():  # the tables join the graph
        axes = tuple(Axis(a.length, index(a.window), index(a.stride), index(a.dilation), *a[4:]) for a in axes)
        cut = tiled_plan.choose_cut(tuple(map(_known_axis, axes)), group, d, index(extra))
        return tiled_plan.make_plan(axes, cut, extra, query.device)
    dtype = _accumulate(query)
    in_out = 2 * d * (query.numel() + key.numel()) // query.shape[-1] * query.dtype.itemsize
    most = _most_bytes(in_out) / dtype.itemsize
    cut = tiled_plan.choose_cut(tuple(map(_known_axis, axes)), group, d, extra, most)
    return tiled_plan.cached_plan(axes, cut, extra, dtype, query.device)


def _most_bytes(in_out: int) -> float:
    """Bytes that a tile, or a chunk of them, may take where query, key, value and output are `in_out`."""
    return max(SMALL_BYTES, MEMORY_RATIO * in_out)


def _splits(plan: Plan, rows: _Rows, row_copies: int, logit_copies: int) -> tuple[int, int]:
    """Into how many chunks tiles and key heads are split, by the copies held of gathered rows and of logits."""
    batch, key_heads, group = rows.sizes
    d, size = _width(rows.query, rows.value), _accumulate(rows.query).itemsize
    unit = size * tiled_plan.workspace(plan.queries * group, plan.slab_keys, d, row_copies, logit_copies)
    in_out = 2 * (group + 1) * key_heads * d * rows.query.dtype.itemsize  # bytes per token
    if tracing():  # the number of chunks must not depend on the number of tokens
        return index(-(-unit * key_heads // (COMPILED_RATIO * in_out * plan.queries))), 1
    tokens = batch * math.prod([query_count(axis) for axis in plan.axes])
    units = max(1, int(min(CACHE_BYTES, _most_bytes(in_out * tokens)) // unit))
    if units < key_heads:
        return max(1, batch * plan.tiles), math.ceil(key_heads / units)
    return max(1, math.ceil(batch * plan.tiles / (units // key_heads))), 1


def _take_queries(x: Tensor, chunk: Chunk) -> Tensor:
    """Rows of a chunk's queries `[n * h, g * q, d]` in the dtype of accumulation."""
    n, h, g, q = chunk.shape
    return x.index_select(0, chunk.query).to(_accumulate(x)).view(n * h, g * q, x.shape[-1])


def _take_keys(x: Tensor, chunk: Chunk, slab: Slab) -> Tensor:
    """Rows of a slab's keys or values `[n * h, k, d]` in the dtype of accumulation."""
    n, h = chunk.shape[:2]
    return x.index_select(0, slab.rows).to(_accumulate(x)).view(n * h, slab.keys, x.shape[-1])


def _accumulate(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _bias_by_class(plan: Plan, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias of every class of tiles in base 2, `[classes, heads, q, k]`; without classes the flat table."""
    if bias is None:
        return None
    flat = bias.flatten(1).to(dtype) * LOG2_E
    if plan.classes is None:
        return flat
    return pad(flat[:, plan.classes.entries].transpose(0, 1), (0, plan.extra)).contiguous()


def _add_bias(logits: Tensor, plan: Plan, chunk: Chunk, slab: Slab, bias: Tensor) -> None:
    n, h, g, q = chunk.shape
    logits = logits.view(n, h * g, q, slab.keys)
    if plan.classes is not None and chunk.kind is not None:
        logits.add_(bias.index_select(0, chunk.kind)[:, chunk.heads])
        return
    keys = slab.keys - slab.extra
    entries = tiled_plan.bias_entries(plan, chunk.rows, slab.slots)  # [n, q, keys]
    values = bias[chunk.heads].index_select(1, entries.flatten()).view(h * g, n, q, keys).transpose(0, 1)
    logits[..., :keys].add_(values)


def _hide(logits: Tensor, plan: Plan, chunk: Chunk, slab: Slab) -> Tensor:
    """Set the logits of keys outside the window to minus infinity, also where they are NaN."""
    n, h, g, q = chunk.shape
    if plan.uniform:
        return logits
    if plan.classes is not None and chunk.kind is not None:
        keep, fill = (x.index_select(0, chunk.kind) for x in (plan.classes.keep, plan.classes.fill))
    else:
        visible = tiled_plan.visibility(plan, chunk.rows, slab.slots, slab.extra)
        if tracing():
            logits = torch.where(visible[:, None], logits.view(n, h * g, q, slab.keys), -math.inf)
            return logits.view(n * h, g * q, slab.keys)
        keep, fill = tiled_plan.mask_bits(visible, logits.dtype)
    bits = logits.view(n, h * g, q * slab.keys).view(keep.dtype)
    bits.bitwise_and_(keep.view(n, 1, q * slab.keys)).bitwise_or_(fill.view(n, 1, q * slab.keys))
    return logits


def _hide_extra(logits: Tensor, rows: _Rows, slab: Slab) -> Tensor:
    """Set the logits of extra keys that are masked to minus infinity."""
    if rows.hidden is None or not slab.extra:
        return logits
    first = slab.keys - slab.extra
    token = slab.rows.view(logits.shape[0], slab.keys)[:, first:] // rows.sizes.key_heads
    hidden = rows.hidden[token - (rows.key.shape[0] // rows.sizes.key_heads - rows.hidden.shape[0])]
    logits[..., first:].masked_fill_(hidden[:, None], -math.inf)
    return logits


def _logits(q: Tensor, k: Tensor, rows: _Rows, plan: Plan, chunk: Chunk, slab: Slab, bias: Tensor | None) -> Tensor:
    """Base-2 logits `[n * h, g * q, k]` of scaled queries."""
    logits = torch.bmm(q, k.mT)
    if bias is not None:
        _add_bias(logits, plan, chunk, slab, bias)
    return _hide_extra(_hide(logits, plan, chunk, slab), rows, slab)


def _forward_chunk(rows: _Rows, plan: Plan, chunk: Chunk, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output rows `[n * h * g * q, d]` and log-sum-exp `[n * h * g * q]` of the chunk's queries."""
    query = _take_queries(rows.query, chunk).mul_(scale * LOG2_E)
    highest = total = out = query.new_zeros(())
    for i, slab in enumerate(chunk.slabs):
        logits = _logits(query, _take_keys(rows.key, chunk, slab), rows, plan, chunk, slab, bias)
        here = logits.amax(-1, keepdim=True)
        if plan.slabs > 1:  # a query may see nothing of a slab, or nothing yet
            here = here.clamp_(min=torch.finfo(here.dtype).min)
            here = torch.maximum(here, highest) if i else here
        weights = logits.sub_(here).exp2_()
        value = _take_keys(rows.value, chunk, slab)
        if i == 0:
            total, out = weights.sum(-1, keepdim=True), torch.bmm(weights, value)
        else:
            before = highest.sub_(here).exp2_()
            total = total.mul_(before).add_(weights.sum(-1, keepdim=True))
            out = out.mul_(before).baddbmm_(weights, value)
        highest = here
    lse = total.log2().add_(highest).mul_(1 / LOG2_E)
    return out.div_(total).to(rows.value.dtype).flatten(0, 1), lse.flatten()


class _Sums(NamedTuple):
    """Sums of the backward over chunks."""

    key: Tensor  # as the rows of key and value, in the dtype of accumulation
    value: Tensor
    bias: Tensor | None  # as `_bias_by_class`


class _Given(NamedTuple):
    """Rows of a query's output and log-sum-exp and of their gradients."""

    out: Tensor | None
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor


def _backward_chunk(
    rows: _Rows, plan: Plan, chunk: Chunk, scale: float, bias: Tensor | None, given: _Given, sums: _Sums
) -> Tensor:
    """Add the gradients of one chunk to those of key, value and bias; returns that of the query, as its rows."""
    n, h, g, q = chunk.shape
    query, grad = _take_queries(rows.query, chunk), _take_queries(given.grad_out, chunk)
    query = query.mul_(scale * LOG2_E)
    lse = given.lse.index_select(0, chunk.query).mul_(LOG2_E).view(n, h * g, q)
    lse = lse.masked_fill_(~tiled_plan.valid(plan, chunk.rows)[:, None], math.inf).view(n * h, g * q, 1)
    grad_lse = given.grad_lse.index_select(0, chunk.query).view(n * h, g * q, 1)
    mean = None
    if given.out is not None:  # where weights are not at hand all at once
        mean = (_take_queries(given.out, chunk) * grad).sum(-1, keepdim=True).sub_(grad_lse)
    grad_query = torch.zeros_like(query)
    for slab in chunk.slabs:
        key, key_rows = _take_keys(rows.key, chunk, slab), slab.rows[:, None]
        weights = _logits(query, key, rows, plan, chunk, slab, bias).sub_(lse).exp2_()
        found = torch.bmm(weights.mT, grad).flatten(0, 1)
        sums.value.scatter_add_(0, key_rows.expand(-1, found.shape[-1]), found)
        slope = torch.bmm(grad, _take_keys(rows.value, chunk, slab).mT).mul_(weights)
        middle = slope.sum(-1, keepdim=True).sub_(grad_lse) if mean is None else mean
        slope = slope.addcmul_(weights, middle, value=-1)
        found = torch.bmm(slope.mT, query).flatten(0, 1)
        sums.key.scatter_add_(0, key_rows.expand(-1, found.shape[-1]), found)
        if sums.bias is not None:
            _add_grad_bias(sums.bias, slope.view(n, h * g, q, slab.keys), plan, chunk, slab)
        grad_query.baddbmm_(slope, key)
    return grad_query.mul_(scale).to(rows.query.dtype).flatten(0, 1)


def _add_grad_bias(grad_bias: Tensor, slope: Tensor, plan: Plan, chunk: Chunk, slab: Slab) -> None:
    if plan.classes is not None and chunk.kind is not None:
        grad_bias[:, chunk.heads] = grad_bias[:, chunk.heads].index_add(0, chunk.kind, slope)
        return
    slope = slope[..., : slab.keys - slab.extra].transpose(0, 1).flatten(1)  # [heads, n * q * k]
    entries = tiled_plan.bias_entries(plan, chunk.rows, slab.slots).flatten().expand_as(slope)
    grad_bias[chunk.heads] = grad_bias[chunk.heads].scatter_add(1, entries, slope)


def _bias_gradient(grad_bias: Tensor, plan: Plan, bias: Tensor) -> Tensor:
    """Gradient of the bias table from what `_add_grad_bias` summed."""
    if plan.classes is not None:
        slope = grad_bias[..., : plan.keys - plan.extra].transpose(0, 1).flatten(1)  # [heads, classes * q * k]
        total = slope.new_zeros(bias.flatten(1).shape)
        grad_bias = total.scatter_add_(1, plan.classes.entries.flatten().expand_as(slope), slope)
    return grad_bias.view(bias.shape).to(bias.dtype)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: NeighborhoodCall,
) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, value dim]` and log-sum-exp `[B, *spatial, heads]`."""
    axes, scale, bias = call.axes, call.scale, call.bias
    additional_keys, additional_values, additional_mask = call.additional
    plan = _make_plan(query, key, value, additional_keys, axes)
    rows = _prepare(query, key, value, additional_keys, additional_values, additional_mask)
    accumulate = _accumulate(query)
    table = _bias_by_class(plan, bias, accumulate)
    splits = _splits(plan, rows, 2, 2)
    if tracing():  # a graph that gathers is bound to fewer lengths than one that scatters, and exports to more formats
        chunks = tiled_plan.chunks(plan, rows.sizes, splits, accumulate, query.device)
        parts = zip(*(_forward_chunk(rows, plan, chunk, scale, table) for (chunk,) in chunks), strict=True)
        places = tiled_plan.places(plan, rows.sizes, query.device)
        out, lse = (torch.cat(part)[places] for part in parts)
        return out, lse
    out = rows.query.new_empty(rows.query.shape[0], value.shape[-1])
    lse = rows.query.new_empty(rows.query.shape[0], dtype=accumulate)
    for parts in tiled_plan.chunks(plan, rows.sizes, splits, accumulate, query.device):
        for chunk in parts:
            # Queries that fill up a tile repeat another of it, so the rows written twice are equal.
            part, part_lse = _forward_chunk(rows, plan, chunk, scale, table)
            out.index_copy_(0, chunk.query, part)
            lse.index_copy_(0, chunk.query, part_lse)
    return out.view(*query.shape[:-1], value.shape[-1]), lse.view(query.shape[:-1])


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
    call: NeighborhoodCall,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, bias, additional_keys and additional_values, None for those not given or not
    `wanted`.

    The output is read only where boxes are cut into slabs; see `reads_output`.
    """
    (out, lse), (grad_out, grad_lse) = outputs, gradients
    assert lse is not None
    axes, scale, bias = call.axes, call.scale, call.bias
    additional_keys, additional_values, additional_mask = call.additional
    plan = _make_plan(query, key, value, additional_keys, axes)
    rows = _prepare(query, key, value, additional_keys, additional_values, additional_mask)
    accumulate, width = lse.dtype, value.shape[-1]
    table = _bias_by_class(plan, bias, accumulate)
    output = None if out is None or plan.slabs == 1 else out.reshape(-1, width)
    given = _Given(output, lse.flatten(), grad_out.reshape(-1, width), grad_lse.flatten())
    sums = _Sums(
        torch.zeros_like(rows.key, dtype=accumulate),
        torch.zeros_like(rows.value, dtype=accumulate),
        None if table is None else torch.zeros_like(table),
    )
    grad_query = torch.zeros_like(rows.query)
    for parts in tiled_plan.chunks(plan, rows.sizes, _splits(plan, rows, 4, 3), accumulate, query.device):
        for chunk in parts:
            part = _backward_chunk(rows, plan, chunk, scale, table, given, sums)
            grad_query.index_add_(0, chunk.query, part)  # zeros from queries that fill up a tile
    grad_key, grad_value = sums.key.mul_(1 / LOG2_E).to(key.dtype), sums.value.to(value.dtype)
    tokens = key.numel() // key.shape[-1]
    if rows.hidden is not None:  # also where the gradient of the output is NaN
        hidden = rows.hidden.repeat_interleave(rows.sizes.key_heads)[:, None]
        grad_key[tokens:].masked_fill_(hidden, 0)
        grad_value[tokens:].masked_fill_(hidden, 0)
    return (
        grad_query.view(query.shape),
        grad_key[:tokens].view(key.shape),
        grad_value[:tokens].view(value.shape),
        None if bias is None or sums.bias is None or not wanted[0] else _bias_gradient(sums.bias, plan, bias),
        None if additional_keys is None or not wanted[1] else grad_key[tokens:].clone().view(additional_keys.shape),
        None
        if additional_values is None or not wanted[2]
        else grad_value[tokens:].clone().view(additional_values.shape),
    )


def reads_output(
    query: Tensor, key: Tensor, value: Tensor, additional_keys: Tensor | None, axes: tuple[Axis, ...]
) -> bool:
    """Return whether the backward of a call reads its output."""
    return not tracing() and _make_plan(query, key, value, additional_keys, axes).slabs > 1


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bias, additional_keys, additional_values, additional_mask, axes, scale):
        ctx.axes, ctx.scale = axes, scale
        call = NeighborhoodCall(axes, scale, bias, additional_keys, additional_values, additional_mask)
        out, lse = forward(query, key, value, call)
        # What is not kept may be written to.
        kept = out if reads_output(query, key, value, additional_keys, axes) else None
        ctx.save_for_backward(query, key, value, bias, additional_keys, additional_values, additional_mask, kept, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        query, key, value, bias, additional_keys, additional_values, additional_mask, out, lse = ctx.saved_tensors
        call = NeighborhoodCall(ctx.axes, ctx.scale, bias, additional_keys, additional_values, additional_mask)
        wanted = ctx.needs_input_grad[3:6]
        with without_autocast(grad_out.device):  # as in the forward
            grads = backward(query, key, value, (out, lse), (grad_out, grad_lse), call, wanted)
        return *grads, None, None, None
