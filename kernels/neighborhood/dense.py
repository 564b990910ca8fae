"""Small dilation groups on CPU: one dense attention each, without tiles.

Where windows are whole groups that is window attention: so it is in half of DiNAT's layers at 224 pixels, and in the
last stage, whose map is one window. Where they are not, a mask hides what a query does not see: PyTorch's fused
attention computes a few times the logits, and is still faster than to gather keys for tiles. It has no gradient of a
bias, and in half precision it is less exact than tiles: these take them.
"""

import math
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from ..calling import resolve_scale, tracing, wants_gradient
from ..window import Axis as WindowAxis
from ..window import relative_bias
from ..window import tiled as windows
from .geometry import Axis, window_bounds

MOST_KEYS = 128  # of a window that is a whole group: its logits are kept for the backward
# Of a group with a mask, measured against tiles: its keys, its keys for every key that a query sees, and where no
# gradient is wanted the logits of the call. Tiles have cheaper logits and more calls, above all in their backward.
MOST_MASKED = 256
MOST_HIDDEN = 5
MOST_LOGITS = 1 << 19


def _is_whole(axes: tuple[Axis, ...]) -> bool:
    return all(a.window * a.dilation == a.length and not a.causal for a in axes)


def covers(axes: tuple[Axis, ...], query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> bool:
    """Whether dense attention serves a call of the tiled path; lengths that are symbolic are not asked."""
    if tracing() or any(a.queries is not None or a.length % a.dilation for a in axes):
        return False
    window = prod(a.window for a in axes)
    if _is_whole(axes):
        return window <= MOST_KEYS
    keys = prod(a.length // a.dilation for a in axes)
    if bias is not None or query.dtype.itemsize < 4 or keys > min(MOST_MASKED, MOST_HIDDEN * window):
        return False
    if not wants_gradient(query, key, value) and query.numel() // query.shape[-1] * keys > MOST_LOGITS:
        return False
    # A mask adds minus infinity, and NaN stays NaN; on CPU it costs nothing to look. Nobody looks for finite numbers
    # whose product is not.
    return query.device.type == "cpu" and all(_is_finite(x) for x in (key, value))


def _is_finite(x: Tensor) -> bool:
    return math.isfinite(x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)).item())


def _groups(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """`[B, *spatial, heads, d]` as `[B * groups, *positions, heads, d]`."""
    rank = len(axes)
    x = x.view(x.shape[0], *[n for a in axes for n in (a.length // a.dilation, a.dilation)], *x.shape[-2:])
    order = (0, *range(2, 2 * rank + 1, 2), *range(1, 2 * rank, 2), 2 * rank + 1, 2 * rank + 2)
    return x.permute(order).flatten(0, rank)


def _ungroup(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """The inverse of `_groups`."""
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
        spread = relative_bias(bias.to(torch.promote_types(query.dtype, torch.float32)), window=window)
    q, k, v = groups
    out, _ = windows.attend(q, k, v, axes=tuple(WindowAxis(w, w) for w in window), scale=factor, bias=spread, lse=False)
    return _ungroup(out, axes)
