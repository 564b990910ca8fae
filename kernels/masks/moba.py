"""MoBA (arXiv:2502.13189): every query attends to the chunks whose mean key it likes best, and to its own."""

import torch
from torch import Tensor

from ..block_sparse.mask import BlockMask
from ..common.calling import PerAxis
from .blocks import block_lengths, block_means, check_query_key, own_or_none, to_mask
from .registry import published
from .select import keep, pair_scores


@published(paper="2502.13189", density="topk")
@torch.no_grad()
def moba(
    query: Tensor,
    key: Tensor,
    *,
    topk: int = 3,
    block: PerAxis[int] = 64,
    causal: bool = False,
) -> BlockMask:
    """Mixture of block attention: a query keeps the `topk` chunks of the largest query times mean key, its own among
    them. Lists are of single queries, `query_block=1`, so the selection is exact.

    Args:
        query, key: `[B, *spatial, heads, d]`, `[B, *key_spatial, key_heads, d]`.
        topk: at least 1.
        block: tokens of a chunk along each axis.
        causal: one axis: only the chunks before the own one are listed, at most topk - 1, as lists cannot order the
            tokens of the own chunk. Merge with `na1d(window=block, stride=block, causal=True)` by log-sum-exps.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    rank = check_query_key(query, key)
    block, one = block_lengths("block", block, rank), (1,) * rank
    own = own_or_none(query, key, one, block)
    if causal and (rank != 1 or own is None):
        raise ValueError(f"causal=True needs one axis, the same for queries and keys; query.shape={tuple(query.shape)}")
    scores = pair_scores(query.flatten(1, -3), block_means(key, block), scale=1.0)  # [B, heads, tokens, chunks]
    if own is not None:
        scores = scores.masked_fill(own, torch.inf)
    allowed = None
    if causal:
        number = torch.arange(scores.shape[-1], device=scores.device)
        allowed = number <= (torch.arange(scores.shape[-2], device=scores.device) // block[0])[:, None]
    kept = keep(scores, rule="topk", topk=topk, allowed=allowed)
    if causal and own is not None:
        kept = kept & ~own
    return to_mask(kept, query_block=one, key_block=block, most=topk)
