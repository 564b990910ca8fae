"""Small dilation groups on CPU: one dense attention each, without tiles.

Where windows are whole groups that is window attention: so it is in half of DiNAT's layers at 224 pixels, and in the
last stage, whose map is one window. Where they are not, a mask hides what a query does not see: PyTorch's fused
attention computes a few times the logits, and is still faster than to gather keys for tiles. It has no gradient of a
bias, and in half precision it is less exact than tiles: these take them. A bias without gradient is part of the mask.

A graph takes the former as plain PyTorch. The latter looks at its numbers, so in a compiled graph it stands inside the
operator of the tiled path: `forward` and `backward`.
"""

import math
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from ..common import fused
from ..common.calling import is_plain_call, resolve_scale, wants_gradient
from ..common.symbolic import known
from ..window import tiled as windows
from ..window.tables import spread_bias
from .geometry import Axis, mask, relative_index

MOST_KEYS = 128  # of a window that is a whole group: its logits are kept for the backward
# Of a group with a mask: its keys (a mask of 1024 takes 4 MiB in float32), and its keys for every key a query sees.
# From 9x9 to 32x32, forward and with backward, dense attention took 0.4 to 0.8 of the time of tiles; at five keys for
# one that is seen both are equal.
MOST_MASKED = 1024
MOST_HIDDEN = 5


def _is_whole(axes: tuple[Axis, ...]) -> bool:
    return all(known(a.window * a.dilation == a.length) and not a.causal for a in axes)


def covers(axes: tuple[Axis, ...], query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> bool:
    """Return whether dense attention serves a call of the tiled path; not in a graph with symbolic lengths."""
    if any(a.queries is not None for a in axes):
        return False
    if _is_whole(axes):
        return prod([a.window for a in axes]) <= MOST_KEYS
    if not is_plain_call() or query.device.type != "cpu" or not _is_masked(axes, query):
        return False
    return not wants_gradient(bias) and _are_hidden_by_masks(query, key, value, bias)


def _group(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """The grid of one of the dilation groups, which are alike."""
    return tuple(a._replace(length=a.length // a.dilation, dilation=1) for a in axes)


def _keys(axes: tuple[Axis, ...]) -> int:
    """Positions of a dilation group."""
    return prod([a.length // a.dilation for a in axes])


def _is_masked(axes: tuple[Axis, ...], query: Tensor) -> bool:
    """Return whether dilation groups, all of one length, are small enough for a mask."""
    if query.dtype.itemsize < 4 or any(a.length % a.dilation for a in axes):
        return False
    return _keys(axes) <= min(MOST_MASKED, MOST_HIDDEN * prod([a.window for a in axes]))


def _is_finite(x: Tensor) -> bool:
    """Return whether a mask, which adds minus infinity, hides all of `x`: NaN would stay NaN. On CPU looking is free;
    nobody looks for finite numbers whose product is not."""
    return math.isfinite(x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)).item())


def _are_hidden_by_masks(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> bool:
    """Return whether numbers of keys that a query does not see stay out, and the bias is not rounded in a mask."""
    if bias is not None and torch.promote_types(bias.dtype, query.dtype) != query.dtype:
        return False
    return all(_is_finite(x) for x in (key, value, bias) if x is not None)


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


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # it is kept for calls in any mode, and for any default device
def _mask(axes: tuple[Axis, ...], dtype: torch.dtype) -> Tensor:
    """Zero where a query of a group sees a key and minus infinity elsewhere, `[positions, positions]`."""
    seen = mask(_group(axes), torch.device("cpu"))
    return torch.zeros(seen.shape, dtype=dtype, device="cpu").masked_fill(~seen, -math.inf)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _entries(axes: tuple[Axis, ...]) -> Tensor:
    """Entry of a flattened bias table for every query and key of a group, flat; of hidden keys one behind the table."""
    group, device = _group(axes), torch.device("cpu")
    behind = prod([2 * a.window - 1 for a in axes])
    return relative_index(group, device).masked_fill(~mask(group, device), behind).flatten()


def _hidden(axes: tuple[Axis, ...], query: Tensor, bias: Tensor | None) -> Tensor | None:
    """What is added to logits: `_mask` with the bias of keys that a query sees, `[1, heads, positions, positions]`."""
    if bias is None:
        return None if _is_whole(axes) else _mask(axes, query.dtype)
    table = F.pad(bias.flatten(1).to(query.dtype), (0, 1), value=-math.inf)
    return table.index_select(1, _entries(axes)).view(1, bias.shape[0], _keys(axes), _keys(axes))


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, axes: tuple[Axis, ...], scale: float | None, bias: Tensor | None
) -> Tensor:
    """Output `[B, *spatial, heads, head_dim]` of calls that `covers` accepts; `bias` as in `api.na2d`."""
    factor = resolve_scale(query, scale)
    groups = [_groups(x, axes) for x in (query, key, value)]
    if not _is_whole(axes):
        rows = [x.flatten(1, -3).transpose(1, 2) for x in groups]
        shared = query.shape[-2] != key.shape[-2]
        hidden = _hidden(axes, query, bias)
        out = F.scaled_dot_product_attention(*rows, attn_mask=hidden, scale=factor, enable_gqa=shared)
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
    """Return whether `forward`, and without a bias `backward`, take a call of the operator of the tiled path."""
    if additional_keys is not None or any(a.queries is not None for a in axes):
        return False
    if query.device.type != "cpu" or query.shape != key.shape or key.shape != value.shape or not query.numel():
        return False
    return _is_masked(axes, query) and _are_hidden_by_masks(query, key, value, bias)


def _dense_rows(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """`[B * groups, heads, positions, d]`, the last axis one number after the other, as fused attention reads it."""
    x = _groups(x, axes).flatten(1, -3).transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _from_rows(x: Tensor, like: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """The inverse of `_dense_rows`, for a grid of the shape of `like` up to its last axis."""
    positions = [a.length // a.dilation for a in axes]
    return _ungroup(x.transpose(1, 2).unflatten(1, positions), axes).view(*like.shape[:-1], x.shape[-1])


def forward(
    query: Tensor, key: Tensor, value: Tensor, *, axes: tuple[Axis, ...], scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of calls that `serves` accepts."""
    hidden = _hidden(axes, query, bias)
    rows = [_dense_rows(x, axes) for x in (query, key, value)]
    out, lse = fused.forward(*rows, mask=hidden, scale=scale)
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
    hidden = _hidden(axes, query, None)
    grad, q, k, v, o = (_dense_rows(x, axes) for x in (grad_out, query, key, value, out))
    sums = _dense_rows(lse[..., None], axes)[..., 0]
    grads = fused.backward(grad, q, k, v, o, sums, mask=hidden, scale=scale)
    dq, dk, dv = (_from_rows(x, query, axes) for x in grads)
    return dq, dk, dv
