"""Scan attention by the Triton kernels: the two passes of torch's dispatcher."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .call import ScanCall
from .gradients import gradients
from .passes import Order, ordered, scan


def _order(call: ScanCall) -> Order:
    gates = ordered(call.log_decay, call.reverse), ordered(call.beta, call.reverse)
    return Order(call.reverse, *gates, widen=call.beta is not None)


def forward(query: Tensor, key: Tensor, value: Tensor, call: ScanCall) -> tuple[Tensor, Tensor]:
    """Output and last state, in float32."""
    if query.shape[0] == 0:
        last = query.new_empty(0, *query.shape[-2:], value.shape[-1], dtype=torch.float32)
        return query.new_empty(*query.shape[:-1], value.shape[-1]), last
    factors = dict(near=call.scale, far=call.scale, strict=call.strict)
    with torch.cuda.device_of(query):
        out, last, _ = scan(query, key, value, _order(call), dtype=query.dtype, first=call.state, **factors)
    return out.view(*query.shape[:-1], value.shape[-1]), last


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
    fields = (call.log_decay, call.beta, call.state)
    if query.shape[0] == 0:
        given = (query, key, value, *fields)
        return tuple(None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format) for x in given)
    rest = dict(first=call.state, scale=call.scale, strict=call.strict, wants_decay=wanted[0])
    with torch.cuda.device_of(query):
        found = gradients(query, key, value, *grads, _order(call), **rest)
    grids = [x.view(y.shape).to(y.dtype) for x, y in zip(found[:3], (query, key, value), strict=True)]
    of_fields = [None if y is None or x is None else x.to(y.dtype) for x, y in zip(found[3:], fields, strict=True)]
    return *grids, *of_fields
