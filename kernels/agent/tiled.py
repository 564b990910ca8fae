"""Agent attention in plain PyTorch, for the CPU and any other device.

Of two ways to attend, the one that measures faster on CPUs: with a bias all logits, which are few since agents are few,
and without one PyTorch's fused attention. Half precision is computed in float32, which takes CPUs no longer.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


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
    """Output `[B, *spatial, heads, head_dim]`; see `api.agent_attention`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v, a = (x.to(dtype).flatten(1, -3).transpose(1, 2) for x in (query, key, value, agent))  # [B, heads, T, d]
    agent_value = _attend(a, k, v, agent_bias, scale)  # [B, heads, A, d]
    return _attend(q, a, agent_value, query_bias, query_scale).transpose(1, 2).reshape(query.shape).to(query.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """One pass, on `[B, heads, T, d]`."""
    if bias is None:
        return scaled_dot_product_attention(query, key, value, scale=scale)
    if query.shape[2] < key.shape[2]:  # the scale goes to the fewer
        query = query * scale
    else:
        key = key * scale
    return (query @ key.transpose(-1, -2) + bias.to(query.dtype)).softmax(-1) @ value
