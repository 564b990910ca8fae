"""Linear attention on CPU: the products of `tiled.py` for some tokens at a time, with the gradient written out.

What some tokens need stays in cache, where memory for all of them would take longer to get than the products take. The
formulas of the gradient are those of `backward.py`; beside inputs and output nothing but the state is kept for them. In
what follows `q`, `k`, `v` and their gradients are `[B, tokens, heads, d]`, and `x` and `y` some tokens of them, heads
first.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.calling import is_plain_call, wants_gradient, without_autocast
from ..common.launching import cdiv
from . import tiled
from .call import LinearCall

CHUNK = 1 << 18  # numbers of one tensor that are worked on at a time
Part = tuple[slice, slice]  # entries of the batch, tokens


def attend(query: Tensor, key: Tensor, value: Tensor, call: LinearCall) -> Tensor:
    """Output `[B, *spatial, heads, value_dim]`; see `api.linear_attention`.

    Graphs that need nothing but torch, and other devices, take all tokens at once, and few tokens without gradients are
    quicker so. All else is differentiable once; a second derivative raises RuntimeError.
    """
    if query.device.type == "cpu" and is_plain_call():
        few = max(query.numel(), key.numel(), value.numel()) <= CHUNK
        if not few or wants_gradient(query, key, value, call.scales):
            return _Attention.apply(query, key, value, call.scales, call)
    return tiled.attend(query, key, value, call)


class _State(NamedTuple):
    """State that queries read, or its gradient."""

    matrix: Tensor  # [B, heads, d, e]: sum or mean of products of a key and a value; when centred, the covariance
    keys: Tensor  # [B, heads, 1, d]: sum or mean; when centred, mean less the first
    values: Tensor  # [B, heads, 1, e]: when centred, mean less the first


def _unpack(state: Tensor, d: int, e: int) -> _State:
    """Views of a packed state `[B, heads, d * e + d + e]`."""
    matrix, keys, values = state.split([d * e, d, e], -1)
    return _State(matrix.unflatten(-1, (d, e)), keys.unsqueeze(2), values.unsqueeze(2))


def forward(query: Tensor, key: Tensor, value: Tensor, call: LinearCall) -> tuple[Tensor, Tensor]:
    """Output, and the packed state."""
    q, k, v = (x.flatten(1, -3) for x in (query, key, value))
    packed = _sum_state(k, v, call)
    state = _unpack(packed, k.shape[-1], v.shape[-1])
    matrix = state.matrix * call.factor(packed.dtype)
    out = query.new_empty(*query.shape[:-1], v.shape[-1])
    for part in _parts(q, v):
        x, into = _read(q, part, call.relu), out.flatten(1, -3)[part].transpose(1, 2)
        y = _product(x, matrix[part[0]], into if into.dtype == packed.dtype else None)
        if call.has_normaliser:
            y /= call.bounded(_product(x, state.keys[part[0]].mT))
        elif call.centered:
            y += _first(v, part) + state.values[part[0]]
        if y is not into:
            into.copy_(y)
    return out, packed


def _sum_state(k: Tensor, v: Tensor, call: LinearCall) -> Tensor:
    """The packed state, in one pass over keys and values."""
    (batch, keys, heads, d), e = k.shape, v.shape[-1]
    packed = k.new_zeros(batch, heads, d * e + d + e, dtype=_accumulate(k))
    state = _unpack(packed, d, e)
    share = 1 / keys if call.mean else 1.0
    means: list[tuple[slice, float, Tensor, Tensor]] = []  # entries, share of the tokens, means of keys and values
    for part in _parts(k, v):
        load = _load if call.centered else _read
        x, y = load(k, part, call.relu), load(v, part)
        if call.centered:
            x.sub_(_first(k, part, call.relu))
            y.sub_(_first(v, part))
            own, key, value = x.shape[2] / keys, x.mean(2, keepdim=True), y.mean(2, keepdim=True)
            x.sub_(key)
            y.sub_(value)
            state.keys[part[0]].add_(key, alpha=own)
            state.values[part[0]].add_(value, alpha=own)
            means.append((part[0], own, key, value))
        elif call.has_normaliser:
            state.keys[part[0]].add_(x.sum(2, keepdim=True), alpha=share)
        state.matrix[part[0]].add_(_product(x.mT, y), alpha=share)
    for entries, own, key, value in means:  # covariance of the parts' means, of entries that have several
        if own < 1:
            spread = (key - state.keys[entries]).mT @ (value - state.values[entries])
            state.matrix[entries].add_(spread, alpha=own)
    return packed


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
    call: LinearCall,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and, if wanted, scales; the output is not read."""
    packed = cast(Tensor, outputs[1])
    q, k, v, do = (x.flatten(1, -3) for x in (query, key, value, gradients[0]))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    state, factor = _unpack(packed, k.shape[-1], v.shape[-1]), call.factor(packed.dtype)
    share = 1 / k.shape[1] if call.mean else 1.0
    with without_autocast(query.device):
        met = state._replace(matrix=state.matrix * factor)
        found = _query_gradient(q, do, met, call, dq.flatten(1, -3))
        dscales = None
        if call.scales is not None and wanted[0]:
            dscales = ((found.matrix * state.matrix).sum((0, 2, 3)) * call.scale).to(call.scales.dtype)
        found = _State(found.matrix * (factor * share), found.keys * share, found.values * share)
        _key_gradient(k, v, state, found, call, dk.flatten(1, -3), dv.flatten(1, -3))
    return dq, dk, dv, dscales


def _query_gradient(q: Tensor, do: Tensor, state: _State, call: LinearCall, dq: Tensor) -> _State:
    """Write dq; the gradient of the state that queries meet."""
    found = _State(*(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in state))
    for part in _parts(q, do):
        x, dy = _read(q, part, call.relu), (_load if call.has_normaliser else _read)(do, part)
        if not call.has_normaliser:
            dx = _product(dy, state.matrix[part[0]].mT)
        else:
            met = _product(x, state.keys[part[0]].mT)
            normaliser = call.bounded(met)
            dy /= normaliser
            dx = _product(dy, state.matrix[part[0]].mT)
            dn = (dx * x).sum(-1, keepdim=True).div_(normaliser).neg_()
            if call.floor is not None:
                dn *= met >= call.floor
            dx.addcmul_(dn, state.keys[part[0]])
            found.keys[part[0]].add_(_product(dn.mT, x))
        found.matrix[part[0]].add_(_product(x.mT, dy))
        if call.centered:
            found.values[part[0]].add_(dy.sum(2, keepdim=True))
        dq[part] = (_through_relu(dx, x) if call.relu else dx).transpose(1, 2)
    return found


def _key_gradient(k: Tensor, v: Tensor, state: _State, found: _State, call: LinearCall, dk: Tensor, dv: Tensor) -> None:
    """Write dk and dv; `found` are the gradients of one product, of one key and of one value."""
    for part in _parts(k, v):
        load = _load if call.centered else _read
        x, y = load(k, part, call.relu), load(v, part)
        if call.centered:
            y.sub_(_first(v, part)).sub_(state.values[part[0]])
        dx = _product(y, found.matrix[part[0]].mT)
        if call.has_normaliser:
            dx += found.keys[part[0]]
        dk[part] = (_through_relu(dx, x) if call.relu else dx).transpose(1, 2)
        if call.centered:
            x.sub_(_first(k, part, call.relu)).sub_(state.keys[part[0]])
        dy = _product(x, found.matrix[part[0]])
        if call.centered:
            dy += found.values[part[0]]
        dv[part] = dy.transpose(1, 2)


def _parts(x: Tensor, y: Tensor) -> list[Part]:
    """Entries of the batch and tokens of `x` and `y` to work on at a time."""
    batch, count, heads, d = x.shape
    most = max(1, CHUNK // (heads * max(d, y.shape[-1])))  # tokens
    entries, tokens = max(1, most // count), cdiv(count, cdiv(count, most))
    return [
        (slice(b, b + entries), slice(t, t + tokens)) for b in range(0, batch, entries) for t in range(0, count, tokens)
    ]


def _load(x: Tensor, part: Part, relu: bool = False) -> Tensor:
    """A part as a tensor of its own in the dtype of sums: a view `[entries, heads, tokens, d]` of memory in the order
    of tokens."""
    own = x[part].to(_accumulate(x), copy=True, memory_format=torch.contiguous_format)
    return (own.relu_() if relu else own).transpose(1, 2)


def _read(x: Tensor, part: Part, relu: bool = False) -> Tensor:
    """A part that is not written to: where it lies, if it has the dtype of sums and rows that BLAS can read."""
    if relu or x.dtype != _accumulate(x) or x.stride(-1) != 1 or x.stride(1) < x.shape[-1]:
        return _load(x, part, relu)
    return x[part].transpose(1, 2)


def _first(x: Tensor, part: Part, relu: bool = False) -> Tensor:
    """First token, subtracted before averaging (shifted mean): a large common offset would cost precision."""
    return _load(x, (part[0], slice(1)), relu)


def _product(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """`x @ y` of `[entries, heads, ...]`, into `out` if given; BLAS finds the heads of an entry where they are, `@`
    would copy them."""
    out = x.new_empty(*x.shape[:-1], y.shape[-1]) if out is None else out
    for i in range(x.shape[0]):
        torch.bmm(x[i], y[i], out=out[i])
    return out


def _accumulate(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _through_relu(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(gradient, x, 0.0)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scales, call):
        ctx.call = replace(call, scales=None)
        out, packed = forward(query, key, value, call)
        ctx.save_for_backward(query, key, value, packed, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, packed, scales = ctx.saved_tensors
        call, wanted = replace(ctx.call, scales=scales), ctx.needs_input_grad[3:4]
        return *backward(query, key, value, (None, packed), (grad_out,), call, wanted), None
