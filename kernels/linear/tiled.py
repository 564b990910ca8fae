"""Linear attention in plain PyTorch, for the CPU and any other device: two products with the state between them.

The normaliser is one more column of the state, so queries are read once. Heads are first brought one after the other in
memory: products would do so by themselves, and sums and ReLU are faster for it. Half precision is computed in float32,
which takes CPUs no longer.
"""

import torch
from torch import Tensor

from .options import Options


def attend(query: Tensor, key: Tensor, value: Tensor, *, options: Options, scale: float | Tensor) -> Tensor:
    """Output `[B, *spatial, heads, value_dim]`; see `api.linear_attention`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(dtype).flatten(1, -3).transpose(1, 2).contiguous() for x in (query, key, value))  # [B, heads, T, d]
    if options.relu:
        q, k = q.relu(), k.relu()
    if isinstance(scale, Tensor):
        scale = scale.to(dtype)[:, None, None]
    share = 1 / k.shape[2] if options.mean else 1.0
    if options.centered:
        middle = v.mean(2, keepdim=True)
        out = q @ ((k - k.mean(2, keepdim=True)).transpose(-1, -2) @ (v - middle) * (share * scale)) + middle
    elif options.eps is None and options.floor is None:
        out = q @ (k.transpose(-1, -2) @ v * (share * scale))
    else:
        state = torch.cat([k.transpose(-1, -2) @ v * (share * scale), k.sum(2).unsqueeze(-1) * share], -1)
        out = q @ state  # [B, heads, N_q, e + 1]
        out, normaliser = out[..., :-1], out[..., -1:]
        out = out / (normaliser.clamp(min=options.floor) if options.eps is None else normaliser + options.eps)
    return out.transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1]).to(query.dtype)
