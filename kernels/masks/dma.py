"""Dynamic mask attention (arXiv:2508.02124): the keys of the largest bias, the same for all queries."""

from math import prod

import torch
from torch import Tensor

from ..block_sparse.mask import BlockMask
from .blocks import block_tokens, check_query_key, cut_into_blocks, to_mask
from .registry import published
from .select import keep


@published(paper="2508.02124", density="window")
@torch.no_grad()
def dma(query: Tensor, key: Tensor, *, bias: Tensor, window: int = 2048, smooth: int | None = None) -> BlockMask:
    """Dynamic mask attention: all queries attend to the `window` keys of the largest bias, which is added to their
    logits. Lists are of single keys, so that each brings its bias; that is a constant of the mask: for its gradient,
    let `biased_attention`'s `widen` carry it as one more channel. Queries need not see themselves.

    Args:
        query, key: `[B, *spatial, heads, d]`, `[B, *key_spatial, key_heads, d]`.
        bias: `[B, key_heads, keys]`, for instance `A * softplus(value @ W)`.
        window: keys, at least 1. Official: 2048.
        smooth: with a number of keys, blocks of so many of the flattened grid are kept whole if more than half of them
            are chosen, and dropped if not.

    Raises:
        ValueError: an argument outside what is accepted.
    """
    rank = check_query_key(query, key)
    keys = prod(key.shape[1:-2])
    if tuple(bias.shape) != (key.shape[0], key.shape[-2], keys):
        raise ValueError(f"bias.shape={tuple(bias.shape)} must be {(key.shape[0], key.shape[-2], keys)}")
    if window < 1 or (smooth is not None and smooth < 1):
        raise ValueError(f"window={window!r} and smooth={smooth!r} must be at least 1 key")
    kept = keep(bias[:, :, None], rule="topk", topk=window)  # [B, key_heads, 1, keys]
    if smooth is not None:
        blocks, _ = cut_into_blocks(
            kept[:, :, 0].transpose(1, 2)[..., None], (smooth,)
        )  # [B, blocks, smooth, heads, 1]
        most = 2 * blocks.sum(2) > block_tokens((keys,), (smooth,), key.device)[:, None, None]
        kept = most.repeat_interleave(smooth, dim=1)[:, :keys, :, 0].transpose(1, 2)[:, :, None]
    group = query.shape[-2] // key.shape[-2]
    kept, bias = (x.repeat_interleave(group, dim=1) for x in (kept, bias[:, :, None]))
    most_listed = None if smooth is not None else window
    mask = to_mask(kept, query_block=query.shape[1:-2], key_block=(1,) * rank, most=most_listed)
    return mask._replace(bias=bias.gather(-1, mask.kv_idx.long()))
