"""Bidirectional sparse attention (arXiv:2509.01085): blocks scored by the queries that stand out of theirs."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..block_sparse.mask import BlockMask
from ..common.calling import PerAxis
from .blocks import block_lengths, block_means, check_query_key, cut_into_blocks, own_or_none, to_mask
from .registry import published
from .select import keep, pair_scores


@torch.no_grad()
def distinct_queries(query: Tensor, block: tuple[int, ...], share: float) -> Tensor:
    """Of every block the share of tokens that are least similar (cosine) to its middle token, bool
    `[B, blocks, tokens of a block, heads]`. Of a short block the middle one of its own tokens, and that share of them.
    """
    tokens, exists = cut_into_blocks(query.to(torch.promote_types(query.dtype, torch.float32)), block)
    number = exists.sum(1)
    middle = exists.cumsum(1).sub(1).eq((number // 2)[:, None]) & exists  # [blocks, tokens]
    centre = (tokens * middle[..., None, None]).sum(2, keepdim=True)
    likeness = (normalize(tokens, dim=-1) * normalize(centre, dim=-1)).sum(-1)
    likeness = likeness.masked_fill(~exists[..., None], torch.inf)
    rank = likeness.sort(dim=2, stable=True).indices.argsort(dim=2)
    wanted = (number * share).to(torch.int64).clamp(min=1)
    return rank < wanted[:, None, None]


@published(paper="2509.01085", density="mass", exact="keys as published; all queries attend")
def bsa(
    query: Tensor,
    key: Tensor,
    *,
    mass: float = 0.9,
    least: int = 1,
    share: float = 0.5,
    block: PerAxis[int] = 4,
    own: bool = True,
) -> BlockMask:
    """Bidirectional sparse attention: the fewest blocks whose share of the softmax of mean query times mean key reaches
    `mass`, means of queries over those that are least like the middle one of their block.

    The paper leaves the other queries out, too, and gives them their neighbour's output; here they attend to the same
    blocks.

    Args:
        query, key: `[B, *spatial, heads, d]`, `[B, *key_spatial, key_heads, d]`.
        mass: in [0, 1].
        least: blocks that a block of queries keeps at least.
        share: of the queries of a block that its mean is made of, in (0, 1].
        block: tokens of a block along each axis.
        own: keep the own block besides; False is the published selection.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share!r} must lie in (0, 1]")
    block = block_lengths("block", block, check_query_key(query, key))
    distinct = distinct_queries(query, block, share)
    tokens, _ = cut_into_blocks(query, block)
    total = (tokens * distinct[..., None]).sum(2, dtype=torch.promote_types(query.dtype, torch.float32))
    scores = pair_scores(total / distinct.sum(2)[..., None], block_means(key, block), scale=query.shape[-1] ** -0.5)
    always = own_or_none(query, key, block, block, own)
    kept = keep(scores.softmax(-1), rule="mass", mass=mass, least=least, always=always)
    return to_mask(kept, query_block=block, key_block=block)
