"""Linear attention by its definition: the weight of every pair. Any dtype, the oracle."""

import torch
from torch import Tensor

from .call import LinearCall


def attend(query: Tensor, key: Tensor, value: Tensor, call: LinearCall) -> Tensor:
    """Output `[B, *spatial, heads, value_dim]`; see `api.linear_attention`."""
    accumulate = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(accumulate).flatten(1, -3).transpose(1, 2) for x in (query, key, value))  # [B, heads, T, d]
    if call.relu:
        q, k = q.relu(), k.relu()
    tokens = k.shape[2] if call.mean else 1
    middle = 0.0
    if call.centered:
        middle = v.mean(2, keepdim=True)
        k, v = k - k.mean(2, keepdim=True), v - middle
    weights = q @ k.transpose(-1, -2) / tokens  # [B, heads, N_q, N_k]
    normaliser = weights.sum(-1, keepdim=True)
    if call.eps is not None:
        weights = weights / (normaliser + call.eps)
    if call.floor is not None:
        weights = weights / normaliser.clamp(min=call.floor)
    out = call.factor(accumulate) * (weights @ v) + middle
    return out.transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1]).to(query.dtype)
