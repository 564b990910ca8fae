"""Agent attention by its definition: all logits, two softmaxes. Any dtype, the oracle."""

import torch
from torch import Tensor

from .call import AgentCall


def attend(query: Tensor, key: Tensor, value: Tensor, call: AgentCall) -> Tensor:
    """Output `[B, *spatial, heads, value_dim]`; see `api.agent_attention`."""
    accumulate = torch.promote_types(query.dtype, torch.float32)

    def flat(x: Tensor) -> Tensor:  # [B, heads, T, d]
        return x.to(accumulate).flatten(1, -3).transpose(1, 2)

    q, k, v, a = flat(query), flat(key), flat(value), flat(call.agent)
    logits = a @ k.transpose(-1, -2) * call.scale  # [B, heads, A, N_k]
    if call.agent_bias is not None:
        logits = logits + call.agent_bias.to(accumulate)
    agent_value = logits.softmax(-1) @ v  # [B, heads, A, value_dim]
    logits = q @ a.transpose(-1, -2) * call.query_scale  # [B, heads, N_q, A]
    if call.query_bias is not None:
        logits = logits + call.query_bias.to(accumulate)
    out = (logits.softmax(-1) @ agent_value).transpose(1, 2)
    return out.reshape(*query.shape[:-1], value.shape[-1]).to(query.dtype)
