"""Agent attention by its definition: all logits, two softmaxes. Any dtype, the oracle."""

import torch
from torch import Tensor


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
    """Output `[B, *spatial, heads, value_dim]`; see `api.agent_attention`."""
    accumulate = torch.promote_types(query.dtype, torch.float32)

    def flat(x: Tensor) -> Tensor:  # [B, heads, T, d]
        return x.to(accumulate).flatten(1, -3).transpose(1, 2)

    q, k, v, a = flat(query), flat(key), flat(value), flat(agent)
    logits = a @ k.transpose(-1, -2) * scale  # [B, heads, A, N_k]
    if agent_bias is not None:
        logits = logits + agent_bias.to(accumulate)
    agent_value = logits.softmax(-1) @ v  # [B, heads, A, value_dim]
    logits = q @ a.transpose(-1, -2) * query_scale  # [B, heads, N_q, A]
    if query_bias is not None:
        logits = logits + query_bias.to(accumulate)
    out = (logits.softmax(-1) @ agent_value).transpose(1, 2)
    return out.reshape(*query.shape[:-1], value.shape[-1]).to(query.dtype)
