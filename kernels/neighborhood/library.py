"""`torch.ops.foveal.neighborhood_*`: schemas, fake kernels, autograd and FLOP formulas of the Triton path.

Only torch is imported here, so a first call may be a compiled one; the kernels are imported when they first run.
"""

from collections.abc import Sequence
from math import copysign

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .geometry import Axis, query_range

FORWARD = "foveal::neighborhood_forward"
BACKWARD = "foveal::neighborhood_backward"
GEOMETRY = "int[] window, int[] stride, int[] dilation, bool[] causal, float scale, int[]? first=None"
EXTRAS = "Tensor? bias, Tensor? extra_key, Tensor? extra_value"

torch.library.define(FORWARD, f"(Tensor query, Tensor key, Tensor value, {EXTRAS}, {GEOMETRY}) -> (Tensor, Tensor)")
torch.library.define(
    BACKWARD,
    "(Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor grad_out, Tensor grad_lse, "
    f"{EXTRAS}, {GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def make_axes(
    queries: Sequence[int], keys: Sequence[int], window: Sequence[int], stride, dilation, causal, first
) -> tuple[Axis, ...]:
    """Axes of validated arguments; `queries` and `keys` are the shapes of query and key.

    Without `first` the queries are the whole grid, else the box that begins there.
    """
    axes = tuple(Axis(*values) for values in zip(keys[1:-2], window, stride, dilation, causal, strict=True))
    if first is None:
        return axes
    return tuple(a._replace(queries=(i, i + n)) for a, i, n in zip(axes, first, queries[1:-2], strict=True))


@torch.library.impl(FORWARD, "default")
def _forward(query, key, value, bias, extra_key, extra_value, window, stride, dilation, causal, scale, first=None):
    from . import launch

    axes = make_axes(query.shape, key.shape, window, stride, dilation, causal, first)
    return launch.forward(
        query, key, value, bias=bias, extra_key=extra_key, extra_value=extra_value, axes=axes, scale=scale
    )


@torch.library.impl(BACKWARD, "default")
def _backward(
    query,
    key,
    value,
    out,
    lse,
    grad_out,
    grad_lse,
    bias,
    extra_key,
    extra_value,
    window,
    stride,
    dilation,
    causal,
    scale,
    first=None,
):
    from . import launch

    axes = make_axes(query.shape, key.shape, window, stride, dilation, causal, first)
    return launch.backward(
        query,
        key,
        value,
        out,
        lse,
        grad_out,
        grad_lse,
        bias=bias,
        extra_key=extra_key,
        extra_value=extra_value,
        axes=axes,
        scale=scale,
    )


@torch.library.register_fake(FORWARD)
def _forward_fake(query, key, value, bias, extra_key, extra_value, window, stride, dilation, causal, scale, first=None):
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.register_fake(BACKWARD)
def _backward_fake(
    query,
    key,
    value,
    out,
    lse,
    grad_out,
    grad_lse,
    bias,
    extra_key,
    extra_value,
    window,
    stride,
    dilation,
    causal,
    scale,
    first=None,
):
    def like(x: Tensor | None) -> Tensor:
        return query.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(query), like(key), like(value), like(bias), like(extra_key), like(extra_value)


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, bias, extra_key, extra_value, *ctx.geometry = inputs
    ctx.save_for_backward(query, key, value, *output, bias, extra_key, extra_value)


def _differentiate(ctx, grad_out, grad_lse):
    query, key, value, out, lse, bias, extra_key, extra_value = ctx.saved_tensors
    if torch.is_grad_enabled() and any(x.requires_grad for x in (grad_out, grad_lse) if x is not None):
        raise NotImplementedError(
            "neighborhood attention has no double backward with impl='triton'; use impl='reference'"
        )
    gradients = torch.ops.foveal.neighborhood_backward(
        query, key, value, out, lse, grad_out, grad_lse, bias, extra_key, extra_value, *ctx.geometry
    )
    given = (query, key, value, bias, extra_key, extra_value)
    return *(None if x is None else g for x, g in zip(given, gradients, strict=True)), *(None for _ in ctx.geometry)


torch.library.register_autograd(FORWARD, _differentiate, setup_context=_setup_context)


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
) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp by the Triton kernels; see `api.na2d`. The kernels take positive scales."""
    if scale <= 0:
        query, scale = query * (copysign(1.0, scale) if scale else 0.0), abs(scale) or 1.0
    _, window, stride, dilation, causal, queries = zip(*axes, strict=True)
    first = None if not any(queries) else [query_range(axis)[0] for axis in axes]
    return torch.ops.foveal.neighborhood_forward(
        query, key, value, bias, extra_key, extra_value, window, stride, dilation, causal, scale, first
    )


def _call_size(query, key, extra_key, *geometry) -> dict:
    """What the cost model asks of a call, from the shapes of its tensors."""
    batch, *_, heads, head_dim = query
    axes = make_axes(query, key, *geometry)
    return dict(axes=axes, batch=batch, heads=heads, head_dim=head_dim, extra=extra_key[1] if extra_key else 0)


@register_flop_formula(torch.ops.foveal.neighborhood_forward)
def _forward_flops(
    query, key, value, bias, extra_key, extra_value, window, stride, dilation, causal, scale, first=None,
    *, out_shape=None, **_,
) -> int:  # fmt: skip
    from . import cost

    return cost.forward_flops(**_call_size(query, key, extra_key, window, stride, dilation, causal, first))


@register_flop_formula(torch.ops.foveal.neighborhood_backward)
def _backward_flops(
    query, key, value, out, lse, grad_out, grad_lse, bias, extra_key, extra_value, window, stride, dilation, causal,
    scale, first=None, *, out_shape=None, **_,
) -> int:  # fmt: skip
    from . import cost

    return cost.backward_flops(**_call_size(query, key, extra_key, window, stride, dilation, causal, first))
