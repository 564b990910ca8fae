"""Agent attention in plain PyTorch for the CPU and any other device: two calls of scaled dot product attention."""

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
    q, k, v, a = (x.flatten(1, -3).transpose(1, 2) for x in (query, key, value, agent))  # [B, heads, T, d]
    agent_bias, query_bias = (None if x is None else x[None].to(q.dtype) for x in (agent_bias, query_bias))
    agent_value = scaled_dot_product_attention(a, k, v, attn_mask=agent_bias, scale=scale)
    out = scaled_dot_product_attention(q, a, agent_value, attn_mask=query_bias, scale=query_scale)
    return out.transpose(1, 2).reshape(query.shape)
