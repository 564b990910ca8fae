"""Scan attention by the Triton kernels: the two passes of torch's dispatcher."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .call import ScanCall
from .chunked import add_up
from .gradients import gradients
from .passes import Order, ordered, scan


def _order(call: ScanCall) -> Order:
    gates = ordered(call.log_decay, call.reverse), ordered(call.beta, call.reverse)
    return Order(call.reverse, *gates, widen=call.beta is not None)


def forward(query: Tensor, key: Tensor, value: Tensor, call: ScanCall) -> tuple[Tensor, Tensor]:
    """Output and last state in float32, of both directions that of the first pass."""
    if query.shape[0] == 0:
        last = query.new_empty(0, *query.shape[-2:], value.shape[-1], dtype=torch.float32)
        return query.new_empty(*query.shape[:-1], value.shape[-1]), last
    passes, found = call.passes(), []
    dtype = query.dtype if len(passes) == 1 else torch.float32
    with torch.cuda.device_of(query):
        for one in passes:
            factors = dict(near=one.scale, far=one.scale, strict=one.strict)
            found.append(scan(query, key, value, _order(one), dtype=dtype, first=one.state, **factors))
        out = sum((x[0] for x in found[1:]), found[0][0])
    return out.view(*query.shape[:-1], value.shape[-1]).to(query.dtype), found[0][1]


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    call: ScanCall,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, log_decay, beta and state."""
    like = (query, key, value, call.log_decay, call.beta, call.state)
    if query.shape[0] == 0:
        return tuple(None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format) for x in like)
    (grad_out, grad_last), passes, found = grads, call.passes(), []
    dtype = query.dtype if len(passes) == 1 else torch.float32
    with torch.cuda.device_of(query):
        for one in passes:
            rest = dict(first=one.state, scale=one.scale, strict=one.strict, wants_decay=wanted[0], dtype=dtype)
            found.append(gradients(query, key, value, grad_out, grad_last, _order(one), **rest))
            grad_last = torch.zeros_like(grad_last)
        return add_up(like, *found)
