"""Agent attention in plain PyTorch, for the CPU and any other device.

Of three ways to attend, the one that measures faster on CPUs. Without a bias it is PyTorch's fused attention, and with
one where agents attend and no gradient is wanted, which it does not have for biases. Else it is all logits, which are
few since agents are; where agents are fewer than numbers in a vector register, tokens come last. Half precision is
computed in float32, which takes CPUs no longer.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..common.calling import is_plain_call, wants_gradient
from ..common.softmax import REGISTER
from ..common.symbolic import known
from .call import AgentCall


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
    if known(query.shape[2] >= key.shape[2]):  # the scale goes to the fewer
        return (query @ (key * scale).mT + bias).softmax(-1) @ value
    # fused attention makes zeros of a row that is all minus infinity, and softmax NaN; on CPU it costs nothing to look
    looks = is_plain_call() and query.device.type == "cpu"
    if wants_gradient(query, key, value, bias) or not looks or not math.isfinite(bias.sum().item()):
        return ((query * scale) @ key.mT + bias).softmax(-1) @ value
    return scaled_dot_product_attention(query, key, value, attn_mask=bias[None], scale=scale)
