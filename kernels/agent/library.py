"""`torch.ops.foveal.agent_pass*`: schemas, fake kernels, autograd and FLOP formulas of the Triton path.

Agent attention is two passes of one operator: agents over keys, then queries over agents. Only torch is imported here,
so a first call may be a compiled one; the kernels are imported when they first run.
"""

from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

FORWARD = "foveal::agent_pass"
BACKWARD = "foveal::agent_pass_backward"

torch.library.define(FORWARD, "(Tensor query, Tensor key, Tensor value, Tensor? bias, float scale) -> (Tensor, Tensor)")
torch.library.define(
    BACKWARD,
    "(Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor grad_out, Tensor? bias, float scale, "
    "bool bias_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl(FORWARD, "default")
def _forward(query, key, value, bias, scale):
    from . import launch

    return launch.forward(query, key, value, bias, scale)


@torch.library.impl(BACKWARD, "default")
def _backward(query, key, value, out, lse, grad_out, bias, scale, bias_gradient):
    from . import launch

    return launch.backward(query, key, value, out, lse, grad_out, bias, scale, bias_gradient)


@torch.library.register_fake(FORWARD)
def _forward_fake(query, key, value, bias, scale):
    lse = query.new_empty(query.shape[0], query.shape[-2], prod(query.shape[1:-2]), dtype=torch.float32)
    return query.new_empty(*query.shape[:-1], value.shape[-1]), lse


@torch.library.register_fake(BACKWARD)
def _backward_fake(query, key, value, out, lse, grad_out, bias, scale, bias_gradient):
    dbias = query.new_empty(0) if bias is None or not bias_gradient else bias.new_empty(bias.shape)
    return *(x.new_empty(x.shape) for x in (query, key, value)), dbias


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, bias, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, bias)


def _differentiate(ctx, grad_out, grad_lse):
    query, key, value, out, lse, bias = ctx.saved_tensors
    if torch.is_grad_enabled() and grad_out.requires_grad:
        raise NotImplementedError(
            "agent attention has no double backward with impl='triton'; use impl='torch' or impl='reference'"
        )
    *gradients, dbias = torch.ops.foveal.agent_pass_backward(
        query, key, value, out, lse, grad_out, bias, ctx.scale, ctx.needs_input_grad[3]
    )
    return *gradients, dbias if ctx.needs_input_grad[3] else None, None


torch.library.register_autograd(FORWARD, _differentiate, setup_context=_setup_context)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent: Tensor,
    *,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    scale: float,
    query_scale: float,
) -> Tensor:
    """Output by the Triton kernels; see `api.agent_attention`."""
    agent_value, _ = torch.ops.foveal.agent_pass(agent, key, value, agent_bias, scale)
    return torch.ops.foveal.agent_pass(query, agent, agent_value, query_bias, query_scale)[0]


def _flops(query, key, value, *, queries: int, values: int) -> int:
    """FLOPs of so many products over features of queries, and of values, for all pairs, from shapes."""
    features = queries * query[-1] + values * value[-1]
    return 2 * prod(query[:-1]) * prod(key[1:-2]) * features


@register_flop_formula(torch.ops.foveal.agent_pass)
def _forward_flops(query, key, value, bias, scale, *, out_shape=None, **_) -> int:
    return _flops(query, key, value, queries=1, values=1)


@register_flop_formula(torch.ops.foveal.agent_pass_backward)
def _backward_flops(
    query, key, value, out, lse, grad_out, bias, scale, bias_gradient, *, out_shape=None, **_
) -> int:  # fmt: skip
    return _flops(query, key, value, queries=3, values=2)
