"""SALE (arXiv:2505.24179): blocks whose weight, estimated in four bits, counts beside what is known exactly."""

from math import log

import torch
from torch import Tensor

from ..block_sparse.mask import BlockMask
from ..common.calling import PerAxis, resolve_scale, without_autocast
from .blocks import check_blocks, cut_into_blocks, own_or_none, to_mask
from .registry import published

LOGITS = 1 << 24  # estimated at a time


def four_bits(x: Tensor) -> Tensor:
    """The tensor in 15 levels per token, symmetric, scaled by its largest entry; the values that they stand for."""
    step = (x.abs().amax(-1, keepdim=True) / 7).clamp(min=torch.finfo(x.dtype).tiny)
    return (x / step).round() * step


@published(paper="2505.24179", density="threshold", exact="own and first blocks are the exact part")
@torch.no_grad()
def sale(
    query: Tensor,
    key: Tensor,
    *,
    threshold: float = 0.004,
    query_block: PerAxis[int] = 64,
    key_block: PerAxis[int] = 32,
    scale: float | None = None,
) -> BlockMask:
    """SALE: a block of keys is kept if for some query of the block its largest estimated weight is at least
    `threshold`, relative to the sum over the own blocks and the first block, which are computed exactly.

    Estimates multiply queries and keys less their means, in four bits per token, and add the exact product of the mean
    query; that of the mean key is the same for all keys. The cost is that of all logits, in four bits where hardware
    has them: this is the selection in plain PyTorch.

    Args:
        query, key: `[B, *spatial, heads, d]`, key of the same grid.
        threshold: per head in the paper, 0.001 to 0.008; 0 keeps everything.
        query_block, key_block: tokens of a block along each axis; `key_block` divides `query_block`.
        scale: factor on query . key; d ** -0.5 when None.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    query_block, key_block = check_blocks(query, key, query_block, key_block)
    if any(q % k for q, k in zip(query_block, key_block, strict=True)):
        raise ValueError(f"key_block={key_block} must divide query_block={query_block}")
    own = own_or_none(query, key, query_block, key_block)
    if own is None or threshold < 0:
        raise ValueError(f"key.shape={tuple(key.shape)} must have the grid of queries, threshold={threshold!r} be >= 0")
    scale = resolve_scale(query, scale)
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(dtype) * scale, key.repeat_interleave(query.shape[-2] // key.shape[-2], dim=-2).to(dtype)
    q, q_there = cut_into_blocks(query, query_block)
    near, near_there = cut_into_blocks(key, query_block)
    k, k_there = cut_into_blocks(key, key_block)
    q, near = (x.permute(0, 3, 1, 2, 4) for x in (q, near))  # [B, heads, blocks, tokens, d]
    keys = k.flatten(1, 2).transpose(1, 2)[:, :, None]  # [B, heads, 1, key blocks * tokens, d]
    absent = ~k_there.flatten()
    q_mean, k_mean = (x.flatten(1, -3).mean(1)[:, :, None, None] for x in (query, key))  # [B, heads, 1, 1, d]
    centred = keys - k_mean
    rough, known = four_bits(centred), own | (torch.arange(own.shape[1], device=own.device) == 0)
    with without_autocast(query.device):
        inside = (q @ near.mT).masked_fill(~near_there[:, None], -torch.inf)
        first = (q @ keys[:, :, :, : k.shape[2]].mT).masked_fill(own[:, None, :1] | ~k_there[0], -torch.inf)
        total = torch.cat([inside, first], dim=-1).logsumexp(-1)  # over the exact part, [B, heads, blocks, tokens]
        least = total + (log(threshold) if threshold else -torch.inf)
        parts = []
        step = max(1, LOGITS // (q.shape[0] * q.shape[1] * q.shape[3] * keys.shape[3]))
        for start in range(0, q.shape[2], step):
            some = q[:, :, start : start + step]
            guess = four_bits(some - q_mean) @ rough.mT + q_mean @ centred.mT + some @ k_mean.mT
            best = guess.masked_fill(absent, -torch.inf).unflatten(-1, k_there.shape).amax(-1)
            enough = best >= least[:, :, start : start + step, :, None]
            parts.append((enough & q_there[start : start + step, :, None]).any(3))
    return to_mask(torch.cat(parts, dim=2) | known, query_block=query_block, key_block=key_block)
