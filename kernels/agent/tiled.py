"""Agent attention in plain PyTorch, for the CPU and any other device.

Of three ways to attend, the one that measures faster on CPUs. Without a bias it is PyTorch's fused attention. With one
it is so too where no gradient is wanted, which fused attention does not have for biases, and agents attend or are many.
Else it is all logits, which are few since agents are; where agents are fewer than numbers in a vector register, tokens
come last. Half precision is computed in float32, which takes CPUs no longer.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..common.calling import is_plain_call, wants_gradient
from ..common.softmax import REGISTER
from ..common.symbolic import known
from .call import AgentCall

FUSED_AGENTS = 48  # from so many keys on fused attention is faster for queries that are more


def attend(query: Tensor, key: Tensor, value: Tensor, call: AgentCall) -> Tensor:
    """Output `[B, *spatial, heads, value_dim]`; see `api.agent_attention`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v, a = (
        x.to(dtype).flatten(1, -3).transpose(1, 2) for x in (query, key, value, call.agent)
    )  # [B, heads, T, d]
    agent_value = _attend(a, k, v, call.agent_bias, call.scale)  # [B, heads, A, value_dim]
    out = _attend(q, a, agent_value, call.query_bias, call.query_scale).transpose(1, 2)
    return out.reshape(*query.shape[:-1], value.shape[-1]).to(query.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """One pass, on `[B, heads, T, d]`."""
    if bias is None:
        return scaled_dot_product_attention(query, key, value, scale=scale)
    bias = bias.to(query.dtype)
    if not torch.compiler.is_compiling() and key.shape[2] < REGISTER:  # a graph that is open in agents would close
        return ((key * scale) @ query.mT + bias.mT).softmax(-2).mT @ value
    more = known(query.shape[2] >= key.shape[2])
    if is_plain_call() and (not more or key.shape[2] >= FUSED_AGENTS) and _is_fused(query, key, value, bias):
        return scaled_dot_product_attention(query, key, value, attn_mask=bias[None], scale=scale)
    if more:  # the scale goes to the fewer
        return (query @ (key * scale).mT + bias).softmax(-1) @ value
    return ((query * scale) @ key.mT + bias).softmax(-1) @ value


def _is_fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> bool:
    """Return whether fused attention gives the values and the gradients that are wanted."""
    if wants_gradient(query, key, value, bias) or query.device.type != "cpu":
        return False
    # fused attention makes zeros of a row that is all minus infinity, and softmax NaN; on CPU it costs little to look
    return math.isfinite(bias.sum().item())
