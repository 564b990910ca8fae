"""Linear attention in plain PyTorch, for the CPU and any other device: two products with the state between them.

The normaliser is one more column of the state, so queries are read once. Heads are first brought one after the other in
memory: products would do so by themselves, and sums and ReLU are faster for it. Half precision is computed in float32,
which takes CPUs no longer.
"""

import torch
from torch import Tensor

from .call import LinearCall


def attend(query: Tensor, key: Tensor, value: Tensor, call: LinearCall) -> Tensor:
    """Output `[B, *spatial, heads, value_dim]`; see `api.linear_attention`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(dtype).flatten(1, -3).transpose(1, 2).contiguous() for x in (query, key, value))  # [B, heads, T, d]
    if call.relu:
        q, k = q.relu(), k.relu()
    share = 1 / k.shape[2] if call.mean else 1.0
    factor = share * call.factor(dtype)
    if call.centered:
        middle = v.mean(2, keepdim=True)
        out = q @ ((k - k.mean(2, keepdim=True)).transpose(-1, -2) @ (v - middle) * factor) + middle
    elif not call.has_normaliser:
        out = q @ (k.transpose(-1, -2) @ v * factor)
    else:
        state = torch.cat([k.transpose(-1, -2) @ v * factor, k.sum(2).unsqueeze(-1) * share], -1)
        out = q @ state  # [B, heads, N_q, e + 1]
        out, normaliser = out[..., :-1], out[..., -1:]
        out = out / call.bounded(normaliser)
    return out.transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1]).to(query.dtype)
