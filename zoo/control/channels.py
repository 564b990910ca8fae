"""Operations with more channels than the model's: biases of low rank, log-sum-exps, extremes of logits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...kernels.common.calling import resolve_scale
from ...kernels.ops import BlockMask, block_sparse_attention
from ..sites import Call

MULTIPLE = 8  # of the head dim, which fused attention asks for
CHUNK = 1024  # queries whose logits are made at a time


def scale_of(call: Call) -> float:
    """Factor on query . key of an operation."""
    return resolve_scale(call.query, call.scale)


def with_bias(call: Call, query_factor: Tensor, key_factor: Tensor, strength: Tensor | float = 1.0) -> Call:
    """The operation with `query_factor @ key_factor.T` on its logits, as channels of queries and keys.

    Args:
        call: the operation.
        query_factor: broadcastable to `[B, queries, heads, rank]`.
        key_factor: broadcastable to `[B, keys, key heads, rank]`.
        strength: of the model's own logits, a number or broadcastable to `[B, queries, heads, 1]`.
    """
    query, key, rank = call.query, call.key, query_factor.shape[-1]
    query = query * (scale_of(call) * strength)
    columns = query_factor.to(query).expand(*query.shape[:-1], rank)
    rows = key_factor.to(key).expand(*key.shape[:-1], rank)
    fill = -(query.shape[-1] + rank) % MULTIPLE
    query, key = pad(torch.cat([query, columns], -1), (0, fill)), pad(torch.cat([key, rows], -1), (0, fill))
    return replace(call, query=query, key=key, scale=1.0)


def logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """`[B, heads, queries, keys]`, in float32 at least."""
    if key.shape[2] != query.shape[2]:
        key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.einsum("bnhd,bmhd->bhnm", query.to(dtype) * scale, key.to(dtype))


def row_extremes(call: Call) -> tuple[Tensor, Tensor]:
    """Lowest and highest logit of each query, `[B, queries, heads]`, by pieces of queries."""
    found = []
    for query in call.query.split(CHUNK, dim=1):
        x = logits(query, call.key, scale_of(call))
        found.append((x.amin(-1).transpose(1, 2), x.amax(-1).transpose(1, 2)))
    return torch.cat([low for low, _ in found], 1), torch.cat([high for _, high in found], 1)


def attend_with_lse(query: Tensor, key: Tensor, value: Tensor, scale: float, block: int = 64) -> tuple[Tensor, Tensor]:
    """Dense attention `[B, queries, heads, value_dim]` and its log-sum-exp `[B, queries, heads]`."""
    counts = [-(-x.shape[1] // block) for x in (query, key)]
    numbers = torch.arange(counts[1], dtype=torch.int32, device=query.device).expand(1, 1, *counts).contiguous()
    mask = BlockMask((block,), (block,), torch.full_like(numbers[..., 0], counts[1]), numbers)
    return block_sparse_attention(query, key, value, mask=mask, scale=scale, return_lse=True)


def energy(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Sum of the squares of each row of the map, `[B, queries, heads]`, without the map: two log-sum-exps."""
    _, once = attend_with_lse(query, key, key, scale)
    _, twice = attend_with_lse(query, key, key, 2 * scale)
    return (twice - 2 * once).exp()
