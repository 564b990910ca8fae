"""LongHeads (arXiv:2402.10685): chunks by a summary of their own attention instead of a mean."""

import torch
from torch import Tensor

from ..block_sparse.mask import BlockMask
from ..common.calling import PerAxis, without_autocast
from .blocks import block_lengths, block_means, check_query_key, cut_into_blocks, most_own, own_or_none, to_mask
from .registry import published
from .select import keep, pair_scores


def chunk_summaries(key: Tensor, block: tuple[int, ...], scale: float) -> Tensor:
    """A key for every block, `[B, blocks, heads, d]`: the keys of the block, weighted by the softmax of their products
    with the mean of the block's attention among its keys."""
    tokens, exists = cut_into_blocks(key.to(torch.promote_types(key.dtype, torch.float32)), block)
    x = tokens.transpose(2, 3)  # [B, blocks, heads, tokens, d]
    absent = ~exists[:, None, None]  # [blocks, 1, 1, tokens]
    with without_autocast(key.device):
        weights = (x @ x.mT * scale).masked_fill(absent, -torch.inf).softmax(-1)
        mixed = (weights @ x).masked_fill(absent.mT, 0).sum(3, keepdim=True) / exists.sum(1)[:, None, None, None]
        return ((mixed @ x.mT * scale).masked_fill(absent, -torch.inf).softmax(-1) @ x)[..., 0, :]


@published(
    paper="2402.10685", density="topk", exact="for query_block=1, without new positions, summaries of keys alone"
)
@torch.no_grad()
def longheads(
    query: Tensor, key: Tensor, *, topk: int = 16, block: PerAxis[int] = 256, query_block: PerAxis[int] = 1
) -> BlockMask:
    """LongHeads: a query keeps the `topk` chunks of the largest product with their summary, among them the first
    chunk, its own and the one before it.

    The paper gives the chosen keys new, contiguous positions; here they keep theirs.

    Args:
        query, key: `[B, *spatial, heads, d]`, `[B, *key_spatial, key_heads, d]`, before rotary positions.
        topk: chunks, at least 3.
        block: tokens of a chunk along each axis.
        query_block: tokens along each axis of a block of queries that share one list, by their mean query. 1 is the
            published selection; blocks run several times faster.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    rank = check_query_key(query, key)
    if topk < 3:
        raise ValueError(f"topk={topk!r} must be at least 3: the first, the own and the previous chunk are kept")
    block, query_block = block_lengths("block", block, rank), block_lengths("query_block", query_block, rank)
    scores = pair_scores(block_means(query, query_block), chunk_summaries(key, block, key.shape[-1] ** -0.5), scale=1.0)
    near = torch.arange(scores.shape[-1], device=scores.device) == 0
    if (own := own_or_none(query, key, query_block, block)) is not None:
        near = near | own | torch.cat([own[:, 1:], torch.zeros_like(own[:, :1])], dim=1)
    kept = keep(scores.masked_fill(near, torch.inf), rule="topk", topk=topk) | near
    most = topk + 2 * (most_own(query_block, block) - 1)
    return to_mask(kept, query_block=query_block, key_block=block, most=most)
