"""`torch.ops.foveal.linear_attention*`: schemas, fake kernels, autograd and FLOP formulas of compiled calls.

There are two pairs of operators: the Triton kernels, and the plain path as `torch.compile` sees it on CPU. Only torch
is imported here, so a first call may be a compiled one; the modules that compute are imported when they first run.
"""

from functools import cache, partial
from importlib import import_module
from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .options import Options, factors

VARIANT = "Tensor? scales, float scale, bool relu, bool mean, bool centered, float? eps, float? floor"
FORWARD = f"(Tensor query, Tensor key, Tensor value, {VARIANT}) -> (Tensor, Tensor)"
BACKWARD = (
    f"(Tensor query, Tensor key, Tensor value, Tensor out, Tensor state, Tensor grad_out, {VARIANT}, "
    "bool scales_gradient) -> (Tensor, Tensor, Tensor, Tensor)"
)
MAX_VALUE_DIM = 128  # that a program takes


def _define(name: str, module: str) -> None:
    """Define `foveal::{name}` and `foveal::{name}_backward`, which `forward` and `backward` of `module` do."""
    forward_name, backward_name = f"foveal::{name}", f"foveal::{name}_backward"
    torch.library.define(forward_name, FORWARD)
    torch.library.define(backward_name, BACKWARD)
    kernels = cache(partial(import_module, module, __package__))
    forward_operator, backward_operator = getattr(torch.ops.foveal, name), getattr(torch.ops.foveal, f"{name}_backward")

    @torch.library.impl(forward_name, "default")
    def forward(query, key, value, scales, scale, *variant):
        return kernels().forward(query, key, value, scales, scale, Options(*variant))

    @torch.library.impl(backward_name, "default")
    def backward(query, key, value, out, state, grad_out, scales, scale, *rest):
        *variant, wanted = rest
        *gradients, dscales = kernels().backward(
            query, key, value, out, state, grad_out, scales, scale, Options(*variant), wanted
        )
        return *gradients, query.new_empty(0) if dscales is None else dscales

    def differentiate(ctx, grad_out, grad_state):
        query, key, value, out, state, scales = ctx.saved_tensors
        if torch.is_grad_enabled() and grad_out.requires_grad:
            raise NotImplementedError("linear attention has no double backward; use impl='reference'")
        wanted = ctx.needs_input_grad[3]
        *gradients, dscales = backward_operator(query, key, value, out, state, grad_out, scales, *ctx.variant, wanted)
        return *gradients, dscales if wanted else None, *(None for _ in ctx.variant)

    torch.library.register_fake(forward_name, _forward_fake)
    torch.library.register_fake(backward_name, _backward_fake)
    torch.library.register_autograd(forward_name, differentiate, setup_context=_setup_context)
    register_flop_formula(forward_operator)(_forward_flops)
    register_flop_formula(backward_operator)(_backward_flops)


def _forward_fake(query, key, value, scales, scale, *variant):
    (d, e), accumulate = (query.shape[-1], value.shape[-1]), torch.promote_types(query.dtype, torch.float32)
    state = query.new_empty(query.shape[0], query.shape[-2], d * e + d + e, dtype=accumulate)
    return query.new_empty(*query.shape[:-1], e), state


def _backward_fake(query, key, value, out, state, grad_out, scales, scale, *rest):
    dscales = scales.new_empty(scales.shape) if rest[-1] else query.new_empty(0)
    return *(x.new_empty(x.shape) for x in (query, key, value)), dscales


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, scales, *ctx.variant = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, scales)


def attend(query: Tensor, key: Tensor, value: Tensor, *, options: Options, scale: float | Tensor) -> Tensor:
    """Output by the Triton kernels; see `api.linear_attention`."""
    parts = [
        torch.ops.foveal.linear_attention(query, key, part, *factors(scale), *options)[0]
        for part in value.split(MAX_VALUE_DIM, -1)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def attend_chunked(query: Tensor, key: Tensor, value: Tensor, *, options: Options, scale: float | Tensor) -> Tensor:
    """Output by the plain path on CPU, as one operator in a compiled graph."""
    return torch.ops.foveal.linear_attention_chunked(query, key, value, *factors(scale), *options)[0]


def _products(query, key, value) -> int:
    """FLOPs of one product of all tokens with the state, from shapes."""
    tokens = prod(query[1:-2]) + prod(key[1:-2])
    return 2 * query[0] * query[-2] * tokens * query[-1] * value[-1]


def _forward_flops(query, key, value, *_, out_shape=None, **__) -> int:
    return _products(query, key, value)


def _backward_flops(query, key, value, *_, out_shape=None, **__) -> int:
    return 2 * _products(query, key, value)


_define("linear_attention", ".launch")
_define("linear_attention_chunked", ".chunked")
