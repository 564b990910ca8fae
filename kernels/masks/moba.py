"""MoBA (arXiv:2502.13189): every query attends to the chunks whose mean key it likes best, and to its own."""

import torch
from torch import Tensor

from ..block_sparse.mask import BlockMask
from ..common.calling import PerAxis
from .blocks import block_lengths, block_means, check_query_key, most_own, own_or_none, to_mask
from .registry import published
from .select import keep, pair_scores


@published(paper="2502.13189", density="topk", exact="exact for query_block=1")
@torch.no_grad()
def moba(
    query: Tensor,
    key: Tensor,
    *,
    topk: int = 3,
    block: PerAxis[int] = 64,
    query_block: PerAxis[int] = 1,
    causal: bool = False,
) -> BlockMask:
    """Mixture of block attention: a query keeps the `topk` chunks of the largest query times mean key, among them its
    own.

    Args:
        query, key: `[B, *spatial, heads, d]`, `[B, *key_spatial, key_heads, d]`.
        topk: at least 1.
        block: tokens of a chunk along each axis.
        query_block: tokens along each axis of a block of queries that share one list, by their mean query. 1 is the
            published selection; blocks run several times faster.
        causal: one axis and single queries. Only the chunks before the own one are listed, at most topk - 1, as lists
            cannot order the tokens of the own chunk. Merge with `na1d(window=block, stride=block, causal=True)` by
            log-sum-exps.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    rank = check_query_key(query, key)
    block, query_block = block_lengths("block", block, rank), block_lengths("query_block", query_block, rank)
    own = own_or_none(query, key, query_block, block)
    if causal and (rank != 1 or own is None or query_block != (1,)):
        raise ValueError(
            f"causal=True needs one axis, the same for queries and keys, and query_block=1; query.shape="
            f"{tuple(query.shape)}, query_block={query_block}"
        )
    scores = pair_scores(block_means(query, query_block), block_means(key, block), scale=1.0)
    if own is not None:
        scores = scores.masked_fill(own, torch.inf)
    allowed = None
    if causal:
        number = torch.arange(scores.shape[-1], device=scores.device)
        allowed = number <= (torch.arange(scores.shape[-2], device=scores.device) // block[0])[:, None]
    kept = keep(scores, rule="topk", topk=topk, allowed=allowed)
    if own is not None:
        kept = kept & ~own if causal else kept | own
    return to_mask(kept, query_block=query_block, key_block=block, most=topk + most_own(query_block, block) - 1)
