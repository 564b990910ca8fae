"""Linear attention in plain PyTorch, for the CPU and any other device: two products with the state between them.

Half precision is computed in float32, which takes CPUs no longer.
"""

import torch
from torch import Tensor

from .options import Options


def attend(query: Tensor, key: Tensor, value: Tensor, *, options: Options, scale: float | Tensor) -> Tensor:
    """Output `[B, *spatial, heads, value_dim]`; see `api.linear_attention`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(dtype).flatten(1, -3).transpose(1, 2) for x in (query, key, value))  # [B, heads, T, d]
    if options.relu:
        q, k = q.relu(), k.relu()
    share = 1 / k.shape[2] if options.mean else 1.0
    mean_value = v.mean(2, keepdim=True) if options.centered else 0.0
    state = k.transpose(-1, -2) @ (v - mean_value if options.centered else v) * share  # [B, heads, d, e]
    out = q @ (state * (scale.to(dtype)[:, None, None] if isinstance(scale, Tensor) else scale))  # [B, heads, N_q, e]
    if options.centered:
        out = out + mean_value
    elif options.eps is not None or options.floor is not None:
        normaliser = q @ (k.sum(2) * share).unsqueeze(-1)  # [B, heads, N_q, 1]
        out = out / (normaliser.clamp(min=options.floor) if options.eps is None else normaliser + options.eps)
    return out.transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1]).to(query.dtype)
