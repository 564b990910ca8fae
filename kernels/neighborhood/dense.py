"""Small dilation groups on CPU: one dense attention each, without tiles.

Where windows are whole groups that is window attention: so it is in half of DiNAT's layers at 224 pixels, and in the
last stage, whose map is one window. Where they are not, a mask hides what a query does not see: PyTorch's fused
attention computes a few times the logits, and is still faster than to gather keys for tiles. It has no gradient of a
bias, and in half precision it is less exact than tiles: these take them.

A graph takes the former as plain PyTorch. The latter looks at its numbers, so in a compiled graph it stands inside the
operator of the tiled path: `forward` and `backward`.
"""

import math
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from ..common.calling import is_plain_call, resolve_scale, wants_gradient
from ..common.symbolic import known
from ..window import tiled as windows
from ..window.tables import spread_bias
from .geometry import Axis, window_bounds

MOST_KEYS = 128  # of a window that is a whole group: its logits are kept for the backward
# Of a group with a mask, measured against tiles: its keys, its keys for every key that a query sees, and where no
# gradient is wanted the logits of the call. Tiles have cheaper logits and more calls, above all in their backward.
MOST_MASKED = 256
MOST_HIDDEN = 5
MOST_LOGITS = 1 << 19
# What `scaled_dot_product_attention` calls on CPU; it does not return its log-sum-exp, which a backward needs.
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _is_whole(axes: tuple[Axis, ...]) -> bool:
    return all(known(a.window * a.dilation == a.length) and not a.causal for a in axes)


def covers(axes: tuple[Axis, ...], query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> bool:
    """Return whether dense attention serves a call of the tiled path; not in a graph with symbolic lengths."""
    if any(a.queries is not None for a in axes):
        return False
    if _is_whole(axes):
        return prod(a.window for a in axes) <= MOST_KEYS
    if not is_plain_call() or query.device.type != "cpu" or bias is not None or not _is_masked(axes, query):
        return False
    if not wants_gradient(query, key, value) and _logits(axes, query) > MOST_LOGITS:
        return False
    return all(_is_finite(x) for x in (key, value))


def _keys(axes: tuple[Axis, ...]) -> int:
    """Positions of a dilation group."""
    return prod(a.length // a.dilation for a in axes)


def _logits(axes: tuple[Axis, ...], query: Tensor) -> int:
    return query.numel() // query.shape[-1] * _keys(axes)


def _is_masked(axes: tuple[Axis, ...], query: Tensor) -> bool:
    """Return whether dilation groups, all of one length, are small enough for a mask."""
    if query.dtype.itemsize < 4 or any(a.length % a.dilation for a in axes):
        return False
    return _keys(axes) <= min(MOST_MASKED, MOST_HIDDEN * prod(a.window for a in axes))


def _is_finite(x: Tensor) -> bool:
    """Return whether a mask, which adds minus infinity, hides all of `x`: NaN would stay NaN. On CPU looking is free;
    nobody looks for finite numbers whose product is not."""
    return math.isfinite(x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)).item())


def _groups(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """`[B, *spatial, heads, d]` as `[B * groups, *positions, heads, d]`."""
    if all(a.dilation == 1 for a in axes):
        return x
    rank = len(axes)
    x = x.view(x.shape[0], *[n for a in axes for n in (a.length // a.dilation, a.dilation)], *x.shape[-2:])
    order = (0, *range(2, 2 * rank + 1, 2), *range(1, 2 * rank, 2), 2 * rank + 1, 2 * rank + 2)
    return x.permute(order).flatten(0, rank)


def _ungroup(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """The inverse of `_groups`."""
    if all(a.dilation == 1 for a in axes):
        return x
    rank = len(axes)
    x = x.view(-1, *[a.dilation for a in axes], *x.shape[1:])
    order = [i for axis in range(rank) for i in (1 + rank + axis, 1 + axis)]
    return x.permute(0, *order, 2 * rank + 1, 2 * rank + 2).reshape(
        x.shape[0], *[a.length for a in axes], *x.shape[-2:]
    )


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # it is kept for calls in any mode, and for any default device
def _mask(axes: tuple[Axis, ...], dtype: torch.dtype) -> Tensor:
    """Zero where a query of a group sees a key and minus infinity elsewhere, `[positions, positions]`."""
    seen = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    for a in axes:
        position = torch.arange(a.length // a.dilation, device="cpu")
        lo, hi = window_bounds(position, len(position), a.window, a.stride, a.causal)
        axis = (position >= lo[:, None]) & (position < hi[:, None])
        seen = (seen[:, None, :, None] & axis[None, :, None, :]).flatten(2).flatten(0, 1)
    return torch.zeros(seen.shape, dtype=dtype, device="cpu").masked_fill(~seen, -math.inf)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, axes: tuple[Axis, ...], scale: float | None, bias: Tensor | None
) -> Tensor:
    """Output `[B, *spatial, heads, head_dim]` of calls that `covers` accepts; `bias` as in `api.na2d`."""
    factor = resolve_scale(query, scale)
    groups = [_groups(x, axes) for x in (query, key, value)]
    if not _is_whole(axes):
        rows = [x.flatten(1, -3).transpose(1, 2) for x in groups]
        shared = query.shape[-2] != key.shape[-2]
        out = F.scaled_dot_product_attention(*rows, attn_mask=_mask(axes, query.dtype), scale=factor, enable_gqa=shared)
        return _ungroup(out.transpose(1, 2).unflatten(1, groups[0].shape[1:-2]), axes)
    window, spread = [a.window for a in axes], None
    if bias is not None:  # whose gradient is summed in float32 at least
        spread = spread_bias(bias.to(torch.promote_types(query.dtype, torch.float32)), window)
        spread = spread.reshape(key.shape[-2], -1, spread.shape[-1])  # heads that share a key head, in turn
    q, k, v = (x.flatten(1, -3).unsqueeze(1) for x in groups)  # a group is one window of all its positions
    out, _ = windows.attend_box(q, k, v, block=spread, scale=factor, lse=False)
    return _ungroup(out.unflatten(1, window), axes)


def serves(
    axes: tuple[Axis, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    additional_keys: Tensor | None,
) -> bool:
    """Return whether `forward` and `backward` take a call of the operator of the tiled path."""
    if bias is not None or additional_keys is not None or any(a.queries is not None for a in axes):
        return False
    if query.device.type != "cpu" or query.shape != key.shape or key.shape != value.shape or not query.numel():
        return False
    return _is_masked(axes, query) and all(_is_finite(x) for x in (key, value))


def _dense_rows(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """`[B * groups, heads, positions, d]`, the last axis one number after the other, as fused attention reads it."""
    x = _groups(x, axes).flatten(1, -3).transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _from_rows(x: Tensor, like: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """The inverse of `_dense_rows`, for a grid of the shape of `like` up to its last axis."""
    positions = [a.length // a.dilation for a in axes]
    return _ungroup(x.transpose(1, 2).unflatten(1, positions), axes).view(*like.shape[:-1], x.shape[-1])


def forward(
    query: Tensor, key: Tensor, value: Tensor, *, axes: tuple[Axis, ...], scale: float
) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp of calls that `serves` accepts; None where tiles are faster."""
    if not _is_whole(axes) and _logits(axes, query) > MOST_LOGITS:
        return None
    mask = None if _is_whole(axes) else _mask(axes, query.dtype)
    rows = [_dense_rows(x, axes) for x in (query, key, value)]
    out, lse = FUSED(*rows, attn_mask=mask, scale=scale)
    return _from_rows(out, query, axes), _from_rows(lse[..., None], query, axes)[..., 0]


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    *,
    axes: tuple[Axis, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of calls that `serves` accepts, where the log-sum-exp has none."""
    mask = None if _is_whole(axes) else _mask(axes, query.dtype)
    grad, q, k, v, o = (_dense_rows(x, axes) for x in (grad_out, query, key, value, out))
    sums = _dense_rows(lse[..., None], axes)[..., 0]
    grads = FUSED_BACKWARD(grad, q, k, v, o, sums, 0.0, False, attn_mask=mask, scale=scale)
    dq, dk, dv = (_from_rows(x, query, axes) for x in grads)
    return dq, dk, dv
