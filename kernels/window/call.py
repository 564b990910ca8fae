"""One call of window attention: checked arguments, and the operators of torch's dispatcher that take them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor

from ..common.calling import PerAxis, check_grids, resolve_scale
from ..common.operator import Operator
from . import cost
from .geometry import Axis, make_axes


@dataclass(frozen=True)
class WindowCall:
    """Everything but query, key and value; see `api.window_attention`.

    Without `return_lse` plain PyTorch may return None for the log-sum-exp, which PyTorch's fused attention lacks.
    """

    axes: tuple[Axis, ...]
    scale: float
    bias: Tensor | None = None
    return_lse: bool = True


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: PerAxis[int],
    shift: PerAxis[int] = 0,
    halo: PerAxis[int] = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = True,
) -> WindowCall:
    """The call of arguments that fit together.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
    """
    rank = query.dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(f"query has shape {tuple(query.shape)}; expected [B, 1 to 3 spatial axes, heads, head_dim]")
    if key.dim() != query.dim() or key.shape[:-1] != value.shape[:-1]:
        check_grids(rank, query, key, value)
    if any(n < 1 for n in query.shape[1:]):
        raise ValueError(f"query.shape={tuple(query.shape)} must have no empty axis but the batch")
    spatial = slice(1, 1 + rank)
    axes = make_axes(query.shape[spatial], window=window, shift=shift, halo=halo, key_shape=key.shape[spatial])
    inner = (slice(None), *(slice(a.margin, a.margin + a.length) for a in axes))
    check_grids(rank, query, key[inner], value[inner])
    expected = (query.shape[-2], prod([a.window for a in axes]), prod([a.span for a in axes]))
    if bias is not None and tuple(bias.shape) != expected:
        raise ValueError(f"bias.shape={tuple(bias.shape)} must be [heads, window tokens, key tokens] = {expected}")
    return WindowCall(axes, resolve_scale(query, scale), bias, return_lse)


def _flops(query: Tensor, key: Tensor, value: Tensor, call: WindowCall) -> tuple[int, int]:
    batch, *_, heads, head_dim = query.shape
    sizes = dict(batch=batch, heads=heads, head_dim=head_dim, value_dim=value.shape[-1])
    return cost.forward_flops(call.axes, **sizes), cost.backward_flops(call.axes, **sizes)


window_operator = Operator(
    "window",
    package=__name__.rpartition(".")[0],
    call=WindowCall,
    differentiable=("bias",),
    flops=_flops,
    summarize=cost.summarize,
    title="window attention with impl='triton'",
)
