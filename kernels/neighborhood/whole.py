"""Windows that are whole dilation groups: every query sees every key of its group, which is window attention.

So it is in half of DiNAT's layers at 224 pixels, and in the last stage, whose map is one window. Nothing is masked or
gathered.
"""

from math import prod

import torch
from torch import Tensor

from ..window import Axis as WindowAxis
from ..window import relative_bias
from ..window import tiled as windows
from .geometry import Axis
from .tiled_plan import tracing

MOST_KEYS = 128  # of a window: its logits are kept for the backward


def covers(axes: tuple[Axis, ...]) -> bool:
    """Whether windows are whole groups, and small; lengths that are symbolic are not asked."""
    if tracing():
        return False
    whole = all(a.window * a.dilation == a.length and not a.causal and a.queries is None for a in axes)
    return whole and prod(a.window for a in axes) <= MOST_KEYS


def _groups(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """`[B, *spatial, heads, d]` as `[B * groups, *window, heads, d]`."""
    rank = len(axes)
    x = x.view(x.shape[0], *[n for a in axes for n in (a.window, a.dilation)], *x.shape[-2:])
    order = (0, *range(2, 2 * rank + 1, 2), *range(1, 2 * rank, 2), 2 * rank + 1, 2 * rank + 2)
    return x.permute(order).flatten(0, rank)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, axes: tuple[Axis, ...], scale: float | None, bias: Tensor | None
) -> Tensor:
    """Output `[B, *spatial, heads, head_dim]` of axes that `covers` accepts; `bias` as in `api.na2d`."""
    rank, window = len(axes), [a.window for a in axes]
    spread = None
    if bias is not None:  # whose gradient is summed in float32 at least
        spread = relative_bias(bias.to(torch.promote_types(query.dtype, torch.float32)), window=window)
    out, _ = windows.attend(
        *(_groups(x, axes) for x in (query, key, value)),
        axes=tuple(WindowAxis(w, w) for w in window),
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        bias=spread,
        lse=False,
    )
    out = out.view(query.shape[0], *[a.dilation for a in axes], *window, *out.shape[-2:])
    order = [i for axis in range(rank) for i in (1 + rank + axis, 1 + axis)]
    return out.permute(0, *order, 2 * rank + 1, 2 * rank + 2).reshape(query.shape)
