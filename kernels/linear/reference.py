"""Linear attention by its definition: the weight of every pair. Any dtype, the oracle."""

import torch
from torch import Tensor

from .options import Options


def attend(query: Tensor, key: Tensor, value: Tensor, *, options: Options, scale: float | Tensor) -> Tensor:
    """Output `[B, *spatial, heads, value_dim]`; see `api.linear_attention`."""
    accumulate = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(accumulate).flatten(1, -3).transpose(1, 2) for x in (query, key, value))  # [B, heads, T, d]
    if options.relu:
        q, k = q.relu(), k.relu()
    if isinstance(scale, Tensor):
        scale = scale.to(accumulate)[:, None, None]
    tokens = k.shape[2] if options.mean else 1
    middle = 0.0
    if options.centered:
        middle = v.mean(2, keepdim=True)
        k, v = k - k.mean(2, keepdim=True), v - middle
    weights = q @ k.transpose(-1, -2) / tokens  # [B, heads, N_q, N_k]
    normaliser = weights.sum(-1, keepdim=True)
    if options.eps is not None:
        weights = weights / (normaliser + options.eps)
    if options.floor is not None:
        weights = weights / normaliser.clamp(min=options.floor)
    out = scale * (weights @ v) + middle
    return out.transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1]).to(query.dtype)
