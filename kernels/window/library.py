"""`torch.ops.foveal.window_*`: schemas, fake kernels, autograd and FLOP formulas of the Triton path.

Only torch is imported here, so a first call may be a compiled one; the kernels are imported when they first run.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .geometry import Axis

FORWARD = "foveal::window_forward"
BACKWARD = "foveal::window_backward"
GEOMETRY = "int[] window, int[] shift, int[] halo, bool padded, float scale"

torch.library.define(FORWARD, f"(Tensor query, Tensor key, Tensor value, Tensor? bias, {GEOMETRY}) -> (Tensor, Tensor)")
torch.library.define(
    BACKWARD,
    "(Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor grad_out, Tensor grad_lse, Tensor? bias, "
    f"{GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _axes(shape: Sequence[int], window, shift, halo, padded: bool) -> tuple[Axis, ...]:
    """Axes of a query of that shape."""
    return tuple(Axis(*values, padded) for values in zip(shape[1:-2], window, shift, halo, strict=True))


@torch.library.impl(FORWARD, "default")
def _forward(query, key, value, bias, window, shift, halo, padded, scale):
    from . import launch

    axes = _axes(query.shape, window, shift, halo, padded)
    return launch.forward(query, key, value, bias=bias, axes=axes, scale=scale)


@torch.library.impl(BACKWARD, "default")
def _backward(query, key, value, out, lse, grad_out, grad_lse, bias, window, shift, halo, padded, scale):
    from . import launch

    axes = _axes(query.shape, window, shift, halo, padded)
    return launch.backward(query, key, value, out, lse, grad_out, grad_lse, bias=bias, axes=axes, scale=scale)


@torch.library.register_fake(FORWARD)
def _forward_fake(query, key, value, bias, window, shift, halo, padded, scale):
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.register_fake(BACKWARD)
def _backward_fake(query, key, value, out, lse, grad_out, grad_lse, bias, window, shift, halo, padded, scale):
    dbias = query.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), dbias


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, bias, *ctx.geometry = inputs
    ctx.save_for_backward(query, key, value, *output, bias)


def _differentiate(ctx, grad_out, grad_lse):
    query, key, value, out, lse, bias = ctx.saved_tensors
    if torch.is_grad_enabled() and any(x.requires_grad for x in (grad_out, grad_lse) if x is not None):
        raise NotImplementedError("window attention has no double backward with impl='triton'; use impl='reference'")
    gradients = torch.ops.foveal.window_backward(query, key, value, out, lse, grad_out, grad_lse, bias, *ctx.geometry)
    return *gradients[:3], None if bias is None else gradients[3], None, None, None, None, None


torch.library.register_autograd(FORWARD, _differentiate, setup_context=_setup_context)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, axes: tuple[Axis, ...], scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp by the Triton kernels; see `api.window_attention`."""
    _, window, shift, halo, padded = zip(*axes, strict=True)
    return torch.ops.foveal.window_forward(query, key, value, bias, window, shift, halo, any(padded), scale)


@register_flop_formula(torch.ops.foveal.window_forward)
def _forward_flops(query, key, value, bias, window, shift, halo, padded, scale, *, out_shape=None, **_) -> int:
    from . import cost

    batch, *_, heads, head_dim = query
    return cost.forward_flops(_axes(query, window, shift, halo, padded), batch=batch, heads=heads, head_dim=head_dim)


@register_flop_formula(torch.ops.foveal.window_backward)
def _backward_flops(
    query, key, value, out, lse, grad_out, grad_lse, bias, window, shift, halo, padded, scale, *, out_shape=None, **_
) -> int:
    from . import cost

    batch, *_, heads, head_dim = query
    return cost.backward_flops(_axes(query, window, shift, halo, padded), batch=batch, heads=heads, head_dim=head_dim)
