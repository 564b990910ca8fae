"""`torch.ops.foveal.neighborhood_*`: schemas, fake kernels, autograd and FLOP formulas of compiled calls.

There are two pairs of operators: the Triton kernels, and the tiled path as `torch.compile` sees it on CPU, where the
graph of its many small steps would take minutes to compile and then run more slowly. Only torch is imported here, so a
first call may be a compiled one; the modules that compute are imported when they first run.
"""

from collections.abc import Sequence
from math import copysign

import torch
from torch import Tensor

from ..common import operators
from .geometry import Axis, query_range

EXTRAS = ("bias", "extra_key", "extra_value")
REST = (
    "int[] window, int[] stride, int[] dilation, bool[] causal, float scale, int[]? first=None, Tensor? extra_mask=None"
)


def _axes(queries: Sequence[int], keys: Sequence[int], window, stride, dilation, causal, first) -> tuple[Axis, ...]:
    """Axes of validated arguments; `queries` and `keys` are the shapes of query and key.

    Without `first` the queries are the whole grid, else the box that begins there.
    """
    axes = tuple(map(Axis, keys[1:-2], window, stride, dilation, causal))
    if first is None:
        return axes
    return tuple(a._replace(queries=(i, i + n)) for a, i, n in zip(axes, first, queries[1:-2], strict=True))


def unpack(
    query, key, bias, extra_key, extra_value, window, stride, dilation, causal, scale, first=None, extra_mask=None
) -> dict:
    """Arguments of `launch` and `tiled`."""
    extra = {"extra_key": extra_key, "extra_value": extra_value, "extra_mask": extra_mask}
    axes = _axes(query.shape, key.shape, window, stride, dilation, causal, first)
    return {"bias": bias, **extra, "axes": axes, "scale": scale}


def flops(
    query,
    key,
    value,
    bias,
    extra_key,
    extra_value,
    window,
    stride,
    dilation,
    causal,
    scale,
    first=None,
    extra_mask=None,
) -> tuple[int, int]:
    from . import cost

    batch, *_, heads, head_dim = query
    axes = _axes(query, key, window, stride, dilation, causal, first)
    extra = extra_key[1] if extra_key else 0
    sizes = dict(batch=batch, heads=heads, head_dim=head_dim, value_dim=value[-1], extra=extra)
    return cost.forward_flops(axes, **sizes), cost.backward_flops(axes, **sizes)


def with_positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """Query and scale of the same logits; the kernels take positive scales."""
    if scale > 0:
        return query, scale
    return query * (copysign(1.0, scale) if scale else 0.0), abs(scale) or 1.0


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    axes: tuple[Axis, ...],
    scale: float,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp by the Triton kernels; see `api.na2d`."""
    query, scale = with_positive_scale(query, scale)
    geometry = pack(axes, scale, extra_mask)
    return torch.ops.foveal.neighborhood_forward(query, key, value, bias, extra_key, extra_value, *geometry)


def attend_tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    axes: tuple[Axis, ...],
    scale: float,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp by the tiled path, as one operator in a compiled graph."""
    geometry = pack(axes, scale, extra_mask)
    return torch.ops.foveal.neighborhood_tiled_forward(query, key, value, bias, extra_key, extra_value, *geometry)


def pack(axes: tuple[Axis, ...], scale: float, extra_mask: Tensor | None) -> tuple:
    """Arguments of `REST`."""
    _, window, stride, dilation, causal, queries = zip(*axes, strict=True)
    first = None if not any(queries) else [query_range(axis)[0] for axis in axes]
    return window, stride, dilation, causal, scale, first, extra_mask


for _name, _module in (("neighborhood", "launch"), ("neighborhood_tiled", "compiled")):
    operators.define(
        _name,
        f"{__package__}.{_module}",
        extras=EXTRAS,
        rest=REST,
        unpack=unpack,
        flops=flops,
        title="neighborhood attention",
    )
