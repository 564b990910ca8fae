"""Neighborhood attention by its definition: all logits, a mask, a softmax. Any dtype, quadratic memory, the oracle."""

import torch
from torch import Tensor

from . import geometry
from .call import NeighborhoodCall


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: NeighborhoodCall,
) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, value dim]` and natural log-sum-exp `[B, *spatial, heads]`; see `api.na2d`."""
    axes, scale, bias = call.axes, call.scale, call.bias
    additional_keys, additional_values, additional_mask = call.additional
    groups = query.shape[-2] // key.shape[-2]
    tokens = slice(1, 1 + len(axes))
    accumulate = torch.promote_types(query.dtype, torch.float32)

    def flat(x: Tensor) -> Tensor:  # [B, heads, T, d], key heads repeated for their query heads
        x = x.to(accumulate).flatten(tokens.start, tokens.stop - 1).transpose(1, 2)
        return x.repeat_interleave(query.shape[-2] // x.shape[1], dim=1)

    q, k, v = flat(query), flat(key), flat(value)
    logits = q @ k.transpose(-1, -2) * scale  # [B, heads, T, T]
    if bias is not None:
        logits = logits + bias.to(accumulate).flatten(1)[:, geometry.relative_index(axes, query.device)]
    logits = logits.masked_fill(~geometry.mask(axes, query.device), float("-inf"))
    if additional_keys is not None and additional_values is not None:
        extras = [x.to(accumulate) for x in (additional_keys, additional_values)]
        if additional_mask is not None:
            extras = [x.masked_fill(~additional_mask[..., None, None], 0.0) for x in extras]
        ek, ev = (x.transpose(1, 2).repeat_interleave(groups, dim=1) for x in extras)
        extra_logits = q @ ek.transpose(-1, -2) * scale
        if additional_mask is not None:
            extra_logits = extra_logits.masked_fill(~additional_mask[:, None, None], float("-inf"))
        logits = torch.cat([logits, extra_logits], dim=-1)
        v = torch.cat([v, ev], dim=2)
    out = (logits.softmax(-1) @ v).transpose(1, 2).unflatten(1, query.shape[tokens])
    lse = logits.logsumexp(-1).transpose(1, 2).unflatten(1, query.shape[tokens])
    return out.to(query.dtype), lse
