"""`torch.ops.foveal.linear_attention*`: schemas, fake kernels, autograd and FLOP formulas of the Triton path.

Only torch is imported here, so a first call may be a compiled one; the kernels are imported when they first run.
"""

from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .options import Options

FORWARD = "foveal::linear_attention"
BACKWARD = "foveal::linear_attention_backward"
VARIANT = "Tensor? scales, float scale, bool relu, bool mean, bool centered, float? eps, float? floor"
MAX_VALUE_DIM = 128  # that a program takes

torch.library.define(FORWARD, f"(Tensor query, Tensor key, Tensor value, {VARIANT}) -> (Tensor, Tensor)")
torch.library.define(
    BACKWARD,
    f"(Tensor query, Tensor key, Tensor value, Tensor out, Tensor state, Tensor grad_out, {VARIANT}, "
    "bool scales_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl(FORWARD, "default")
def _forward(query, key, value, scales, scale, *variant):
    from . import launch

    return launch.forward(query, key, value, scales, scale, Options(*variant))


@torch.library.impl(BACKWARD, "default")
def _backward(query, key, value, out, state, grad_out, scales, scale, *rest):
    from . import launch

    *variant, scales_gradient = rest
    options = Options(*variant)
    *gradients, dstate = launch.backward(query, key, value, out, state, grad_out, scales, scale, options)
    if not scales_gradient:
        return *gradients, query.new_empty(0)
    d, e = query.shape[-1], value.shape[-1]
    matrix, key_sum, value_sum = state.split([d * e, d, e], -1)
    share = 1 / prod(key.shape[1:-2]) if options.mean else 1.0
    met = matrix.unflatten(-1, (d, e))
    if options.centered:
        met = met - key_sum.unsqueeze(-1) * value_sum.unsqueeze(-2) * share
    found = (dstate[..., : d * e].unflatten(-1, (d, e)) * met).sum((0, 2, 3)) * (share * scale)
    return *gradients, found.to(scales.dtype)


@torch.library.register_fake(FORWARD)
def _forward_fake(query, key, value, scales, scale, *variant):
    d, e = query.shape[-1], value.shape[-1]
    state = query.new_empty(query.shape[0], query.shape[-2], d * e + d + e, dtype=torch.float32)
    return query.new_empty(*query.shape[:-1], e), state


@torch.library.register_fake(BACKWARD)
def _backward_fake(query, key, value, out, state, grad_out, scales, scale, *rest):
    dscales = scales.new_empty(scales.shape) if rest[-1] else query.new_empty(0)
    return *(x.new_empty(x.shape) for x in (query, key, value)), dscales


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, scales, *ctx.variant = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, scales)


def _differentiate(ctx, grad_out, grad_state):
    query, key, value, out, state, scales = ctx.saved_tensors
    if torch.is_grad_enabled() and grad_out.requires_grad:
        raise NotImplementedError(
            "linear attention has no double backward with impl='triton'; use impl='tiled' or impl='reference'"
        )
    wanted = ctx.needs_input_grad[3]
    *gradients, dscales = torch.ops.foveal.linear_attention_backward(
        query, key, value, out, state, grad_out, scales, *ctx.variant, wanted
    )
    return *gradients, dscales if wanted else None, *(None for _ in ctx.variant)


torch.library.register_autograd(FORWARD, _differentiate, setup_context=_setup_context)


def attend(query: Tensor, key: Tensor, value: Tensor, *, options: Options, scale: float | Tensor) -> Tensor:
    """Output by the Triton kernels; see `api.linear_attention`."""
    factors = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    parts = [
        torch.ops.foveal.linear_attention(query, key, part, *factors, *options)[0]
        for part in value.split(MAX_VALUE_DIM, -1)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _products(query, key, value) -> int:
    """FLOPs of one product of all tokens with the state, from shapes."""
    tokens = prod(query[1:-2]) + prod(key[1:-2])
    return 2 * query[0] * query[-2] * tokens * query[-1] * value[-1]


@register_flop_formula(torch.ops.foveal.linear_attention)
def _forward_flops(query, key, value, *_, out_shape=None, **__) -> int:
    return _products(query, key, value)


@register_flop_formula(torch.ops.foveal.linear_attention_backward)
def _backward_flops(query, key, value, *_, out_shape=None, **__) -> int:
    return 2 * _products(query, key, value)
