"""Linear attention on CPU: the products of `tiled.py` for some tokens at a time, with the gradient written out.

What some tokens need stays in cache, where memory for all of them would take longer to get than the products take. The
formulas of the gradient are those of `backward.py`; beside inputs and output nothing but the state is kept for them. In
what follows `q`, `k`, `v` and their gradients are `[B, tokens, heads, d]`, and `x` and `y` some tokens of them, heads
first.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.calling import without_autocast
from ..common.launching import cdiv
from .options import Options, factors

CHUNK = 1 << 18  # numbers of one tensor that are worked on at a time
Part = tuple[slice, slice]  # entries of the batch, tokens


def attend(query: Tensor, key: Tensor, value: Tensor, *, options: Options, scale: float | Tensor) -> Tensor:
    """Output `[B, *spatial, heads, value_dim]`; see `api.linear_attention`.

    Differentiable once; a second derivative raises RuntimeError.
    """
    return _Attention.apply(query, key, value, *factors(scale), options)


class _State(NamedTuple):
    """What queries meet, and its gradient."""

    matrix: Tensor  # [B, heads, d, e]: sum or mean of products of a key and a value; when centred, the covariance
    keys: Tensor  # [B, heads, 1, d]: sum or mean; when centred, mean less the first
    values: Tensor  # [B, heads, 1, e]: when centred, mean less the first


def _unpack(state: Tensor, d: int, e: int) -> _State:
    """Views of a packed state `[B, heads, d * e + d + e]`."""
    matrix, keys, values = state.split([d * e, d, e], -1)
    return _State(matrix.unflatten(-1, (d, e)), keys.unsqueeze(2), values.unsqueeze(2))


def forward(
    query: Tensor, key: Tensor, value: Tensor, scales: Tensor | None, scale: float, options: Options
) -> tuple[Tensor, Tensor]:
    """Output, and the packed state."""
    q, k, v = (x.flatten(1, -3) for x in (query, key, value))
    packed = _sum_state(k, v, options)
    state = _unpack(packed, k.shape[-1], v.shape[-1])
    matrix = state.matrix * _factor(scales, scale, packed.dtype)
    out = query.new_empty(*query.shape[:-1], v.shape[-1])
    for part in _parts(q, v):
        x = _load(q, part, options.relu)
        y = x @ matrix[part[0]]
        if _normalised(options):
            y /= _bounded(x @ state.keys[part[0]].mT, options)
        if options.centered:
            y += _first(v, part) + state.values[part[0]]
        out.flatten(1, -3)[part] = y.transpose(1, 2)
    return out, packed


def _sum_state(k: Tensor, v: Tensor, options: Options) -> Tensor:
    """The packed state."""
    (batch, keys, heads, d), e = k.shape, v.shape[-1]
    packed = k.new_zeros(batch, heads, d * e + d + e, dtype=_accumulate(k))
    state = _unpack(packed, d, e)
    share = 1 / keys if options.mean else 1.0
    if options.centered:
        for part in _parts(k, v):
            x, y = _load(k, part, options.relu), _load(v, part)
            state.keys[part[0]].add_(x.sub_(_first(k, part, options.relu)).sum(2, keepdim=True))
            state.values[part[0]].add_(y.sub_(_first(v, part)).sum(2, keepdim=True))
        packed *= share
    for part in _parts(k, v):
        x, y = _load(k, part, options.relu), _load(v, part)
        if options.centered:
            x.sub_(_first(k, part, options.relu)).sub_(state.keys[part[0]])
            y.sub_(_first(v, part)).sub_(state.values[part[0]])
        elif _normalised(options):
            state.keys[part[0]].add_(x.sum(2, keepdim=True), alpha=share)
        state.matrix[part[0]].add_(x.mT @ y, alpha=share)
    return packed


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    packed: Tensor,
    grad_out: Tensor,
    scales: Tensor | None,
    scale: float,
    options: Options,
    scales_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and, if wanted, scales; `out` is not read."""
    q, k, v, do = (x.flatten(1, -3) for x in (query, key, value, grad_out))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    state, factor = _unpack(packed, k.shape[-1], v.shape[-1]), _factor(scales, scale, packed.dtype)
    share = 1 / k.shape[1] if options.mean else 1.0
    with without_autocast(query.device):
        met = state._replace(matrix=state.matrix * factor)
        found = _query_gradient(q, do, met, options, dq.flatten(1, -3))
        dscales = None
        if scales is not None and scales_gradient:
            dscales = ((found.matrix * state.matrix).sum((0, 2, 3)) * scale).to(scales.dtype)
        found = _State(found.matrix * (factor * share), found.keys * share, found.values * share)
        _key_gradient(k, v, state, found, options, dk.flatten(1, -3), dv.flatten(1, -3))
    return dq, dk, dv, dscales


def _query_gradient(q: Tensor, do: Tensor, state: _State, options: Options, dq: Tensor) -> _State:
    """Write dq; the gradient of the state that queries meet."""
    found = _State(*(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in state))
    for part in _parts(q, do):
        x, dy = _load(q, part, options.relu), _load(do, part)
        if not _normalised(options):
            dx = dy @ state.matrix[part[0]].mT
        else:
            met = x @ state.keys[part[0]].mT
            normaliser = _bounded(met, options)
            dy /= normaliser
            dx = dy @ state.matrix[part[0]].mT
            dn = (dx * x).sum(-1, keepdim=True).div_(normaliser).neg_()
            if options.floor is not None:
                dn *= met >= options.floor
            dx.addcmul_(dn, state.keys[part[0]])
            found.keys[part[0]].add_(dn.mT @ x)
        found.matrix[part[0]].add_(x.mT @ dy)
        if options.centered:
            found.values[part[0]].add_(dy.sum(2, keepdim=True))
        dq[part] = (_through_relu(dx, x) if options.relu else dx).transpose(1, 2)
    return found


def _key_gradient(k: Tensor, v: Tensor, state: _State, found: _State, options: Options, dk: Tensor, dv: Tensor) -> None:
    """Write dk and dv; `found` are the gradients of one product, of one key and of one value."""
    for part in _parts(k, v):
        x, y = _load(k, part, options.relu), _load(v, part)
        if options.centered:
            y.sub_(_first(v, part)).sub_(state.values[part[0]])
        dx = y @ found.matrix[part[0]].mT
        if _normalised(options):
            dx += found.keys[part[0]]
        dk[part] = (_through_relu(dx, x) if options.relu else dx).transpose(1, 2)
        if options.centered:
            x.sub_(_first(k, part, options.relu)).sub_(state.keys[part[0]])
        dy = x @ found.matrix[part[0]]
        if options.centered:
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
    """A part `[entries, heads, tokens, d]` as a tensor of its own, in the dtype of sums.

    Memory is read in its order first, and transposed in cache.
    """
    own = x[part].to(_accumulate(x), copy=True)
    return (own.relu_() if relu else own).transpose(1, 2).contiguous()


def _first(x: Tensor, part: Part, relu: bool = False) -> Tensor:
    """The first token of a part's entries: means are taken less it, so that large ones do not swallow what is left."""
    return _load(x, (part[0], slice(1)), relu)


def _accumulate(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _factor(scales: Tensor | None, scale: float, dtype: torch.dtype) -> float | Tensor:
    return scale if scales is None else scales.to(dtype)[:, None, None] * scale


def _normalised(options: Options) -> bool:
    return options.eps is not None or options.floor is not None


def _bounded(met: Tensor, options: Options) -> Tensor:
    """The normaliser, of what queries make of the sum of keys."""
    return met.clamp(min=options.floor) if options.eps is None else met + options.eps


def _through_relu(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(gradient, x, 0.0)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scales, scale, options):
        ctx.scale, ctx.options = scale, options
        out, packed = forward(query, key, value, scales, scale, options)
        ctx.save_for_backward(query, key, value, packed, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, packed, scales = ctx.saved_tensors
        given = scales, ctx.scale, ctx.options, ctx.needs_input_grad[3]
        return *backward(query, key, value, None, packed, grad_out, *given), None, None
