"""Window attention by its definition: all logits, a mask, a softmax. Any dtype, quadratic memory, the oracle."""

import torch
from torch import Tensor

from . import geometry
from .call import WindowCall


def attend(query: Tensor, key: Tensor, value: Tensor, call: WindowCall) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, value_dim]` and natural log-sum-exp `[B, *spatial, heads]`; see the public op."""
    axes, bias = call.axes, call.bias
    accumulate = torch.promote_types(query.dtype, torch.float32)
    last = len(axes)

    def flat(x: Tensor) -> Tensor:  # [B, heads, T, d], key heads repeated for their query heads
        x = x.to(accumulate).flatten(1, last).transpose(1, 2)
        return x.repeat_interleave(query.shape[-2] // x.shape[1], dim=1)

    q, k, v = flat(query), flat(key), flat(value)
    logits = q @ k.transpose(-1, -2) * call.scale  # [B, heads, queries, keys]
    if bias is not None:
        logits = logits + bias.to(accumulate).flatten(1)[:, geometry.bias_index(axes, query.device)]
    logits = logits.masked_fill(~geometry.mask(axes, query.device), float("-inf"))
    out = (logits.softmax(-1) @ v).transpose(1, 2).unflatten(1, query.shape[1 : 1 + last])
    lse = logits.logsumexp(-1).transpose(1, 2).unflatten(1, query.shape[1 : 1 + last])
    return out.to(query.dtype), lse
