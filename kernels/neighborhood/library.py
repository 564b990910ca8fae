"""`torch.ops.foveal.neighborhood_*`: schemas, fake kernels, autograd and FLOP formulas of compiled calls.

There are two pairs of operators: the Triton kernels, and the tiled path as `torch.compile` sees it on CPU, where the
graph of its many small steps would take minutes to compile and then run more slowly. Only torch is imported here, so a
first call may be a compiled one; the modules that compute are imported when they first run.
"""

from collections.abc import Sequence
from functools import cache, partial
from importlib import import_module
from math import copysign

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .geometry import Axis, query_range

GEOMETRY = "int[] window, int[] stride, int[] dilation, bool[] causal, float scale, int[]? first=None"
EXTRAS = "Tensor? bias, Tensor? extra_key, Tensor? extra_value"
FORWARD = f"(Tensor query, Tensor key, Tensor value, {EXTRAS}, {GEOMETRY}) -> (Tensor, Tensor)"
BACKWARD = (
    "(Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor grad_out, Tensor grad_lse, "
    f"{EXTRAS}, {GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
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


def _define(name: str, module: str) -> None:
    """Define `foveal::{name}_forward` and `foveal::{name}_backward`, which `forward` and `backward` of `module` do."""
    forward_name, backward_name = f"foveal::{name}_forward", f"foveal::{name}_backward"
    torch.library.define(forward_name, FORWARD)
    torch.library.define(backward_name, BACKWARD)
    kernels = cache(partial(import_module, module, __package__))

    @torch.library.impl(forward_name, "default")
    def forward(query, key, value, bias, extra_key, extra_value, window, stride, dilation, causal, scale, first=None):
        axes = make_axes(query.shape, key.shape, window, stride, dilation, causal, first)
        out, lse = kernels().forward(
            query, key, value, bias=bias, extra_key=extra_key, extra_value=extra_value, axes=axes, scale=scale
        )
        return out.contiguous(), lse.contiguous()

    @torch.library.impl(backward_name, "default")
    def backward(
        query, key, value, out, lse, grad_out, grad_lse, bias, extra_key, extra_value, window, stride, dilation, causal,
        scale, first=None,
    ):  # fmt: skip
        axes = make_axes(query.shape, key.shape, window, stride, dilation, causal, first)
        given = query, key, value, bias, extra_key, extra_value
        gradients = kernels().backward(
            query, key, value, out, lse, grad_out, grad_lse,
            bias=bias, extra_key=extra_key, extra_value=extra_value, axes=axes, scale=scale,
        )  # fmt: skip
        return tuple(query.new_empty(0) if x is None else g.contiguous() for x, g in zip(given, gradients, strict=True))

    def differentiate(ctx, grad_out, grad_lse):
        query, key, value, out, lse, bias, extra_key, extra_value = ctx.saved_tensors
        if torch.is_grad_enabled() and any(x.requires_grad for x in (grad_out, grad_lse) if x is not None):
            raise NotImplementedError("neighborhood attention has no double backward; use impl='reference'")
        gradients = getattr(torch.ops.foveal, f"{name}_backward")(
            query, key, value, out, lse, grad_out, grad_lse, bias, extra_key, extra_value, *ctx.geometry
        )
        given = (query, key, value, bias, extra_key, extra_value)
        return *(None if x is None else g for x, g in zip(given, gradients, strict=True)), *(None for _ in ctx.geometry)

    torch.library.register_fake(forward_name, _forward_fake)
    torch.library.register_fake(backward_name, _backward_fake)
    torch.library.register_autograd(forward_name, differentiate, setup_context=_setup_context)
    register_flop_formula(getattr(torch.ops.foveal, f"{name}_forward"))(_forward_flops)
    register_flop_formula(getattr(torch.ops.foveal, f"{name}_backward"))(_backward_flops)


def _forward_fake(query, key, value, bias, extra_key, extra_value, window, stride, dilation, causal, scale, first=None):
    accumulate = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=accumulate)


def _backward_fake(query, key, value, out, lse, grad_out, grad_lse, bias, extra_key, extra_value, *_, **__):
    def like(x: Tensor | None) -> Tensor:
        return query.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(query), like(key), like(value), like(bias), like(extra_key), like(extra_value)


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, bias, extra_key, extra_value, *ctx.geometry = inputs
    ctx.save_for_backward(query, key, value, *output, bias, extra_key, extra_value)


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
    return torch.ops.foveal.neighborhood_forward(
        query, key, value, bias, extra_key, extra_value, *_geometry(axes, scale)
    )


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
) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp by the tiled path, as one operator in a compiled graph."""
    return torch.ops.foveal.neighborhood_tiled_forward(
        query, key, value, bias, extra_key, extra_value, *_geometry(axes, scale)
    )


def _geometry(axes: tuple[Axis, ...], scale: float) -> tuple:
    _, window, stride, dilation, causal, queries = zip(*axes, strict=True)
    first = None if not any(queries) else [query_range(axis)[0] for axis in axes]
    return window, stride, dilation, causal, scale, first


def _call_size(query, key, extra_key, *geometry) -> dict:
    """What the cost model asks of a call, from the shapes of its tensors."""
    batch, *_, heads, head_dim = query
    axes = make_axes(query, key, *geometry)
    return dict(axes=axes, batch=batch, heads=heads, head_dim=head_dim, extra=extra_key[1] if extra_key else 0)


def _forward_flops(
    query, key, value, bias, extra_key, extra_value, window, stride, dilation, causal, scale, first=None,
    *, out_shape=None, **_,
) -> int:  # fmt: skip
    from . import cost

    return cost.forward_flops(**_call_size(query, key, extra_key, window, stride, dilation, causal, first))


def _backward_flops(
    query, key, value, out, lse, grad_out, grad_lse, bias, extra_key, extra_value, window, stride, dilation, causal,
    scale, first=None, *, out_shape=None, **_,
) -> int:  # fmt: skip
    from . import cost

    return cost.backward_flops(**_call_size(query, key, extra_key, window, stride, dilation, causal, first))


_define("neighborhood", ".launch")
_define("neighborhood_tiled", ".tiled")
