"""AnchorAttention (arXiv:2505.23520): keys whose logit comes within a difference of the maximum over an anchor."""

import torch
from torch import Tensor

from ..block_sparse.mask import BlockMask
from ..common.calling import PerAxis, resolve_scale, without_autocast
from .blocks import block_means, check_blocks, cut_into_blocks, own_or_none, to_mask
from .registry import published
from .select import pair_scores


@published(paper="2505.23520", density="difference", exact="without order: keys outside the anchor once")
@torch.no_grad()
def anchor(
    query: Tensor,
    key: Tensor,
    *,
    difference: float = 12.0,
    query_block: PerAxis[int] = 64,
    key_block: PerAxis[int] = 1,
    scale: float | None = None,
) -> BlockMask:
    """AnchorAttention's stripes. The anchor of a query are the keys of its own block and of the first one. A block of
    keys is kept for a block of queries if the mean query's logit with one of its keys is at least the mean of the
    queries' largest logits in the anchor, less `difference`.

    A difference of logits does not depend on the number of tokens, unlike a number of blocks. The published code never
    visits some keys and counts others twice; here candidates are all keys outside the anchor.

    Args:
        query, key: `[B, *spatial, heads, d]`, key of the same grid.
        difference: in natural logits. Official: 12. Infinity keeps everything, minus infinity the anchor.
        query_block: tokens along each axis of a block of queries and of the anchor.
        key_block: tokens of a block of keys; 1 are the published stripes, larger ones load faster. It divides
            `query_block`, so that no key is listed twice.
        scale: factor on query . key; d ** -0.5 when None.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    query_block, key_block = check_blocks(query, key, query_block, key_block)
    if any(q % k for q, k in zip(query_block, key_block, strict=True)):
        raise ValueError(f"key_block={key_block} must divide query_block={query_block}")
    own = own_or_none(query, key, query_block, key_block)
    if own is None:
        raise ValueError(f"key.shape={tuple(key.shape)} must have the grid of query.shape={tuple(query.shape)}")
    scale = resolve_scale(query, scale)
    key = key.repeat_interleave(query.shape[-2] // key.shape[-2], dim=-2)
    dtype = torch.promote_types(query.dtype, torch.float32)
    (q, q_there), (k, k_there) = ((x.to(dtype).transpose(2, 3), there) for x, there in (
        cut_into_blocks(query, query_block), cut_into_blocks(key, query_block)))  # fmt: skip
    with without_autocast(query.device):  # q, k: [B, blocks, heads, tokens, d]
        near = (q @ k.mT * scale).masked_fill(~k_there[:, None, None], -torch.inf).amax(-1)
        first = (q @ k[:, :1].mT * scale).masked_fill(~k_there[0], -torch.inf).amax(-1)
    largest = torch.maximum(near, first).masked_fill(~q_there[:, None], 0).sum(-1) / q_there.sum(1)[:, None]
    means = block_means(query, query_block)
    blocks, there = cut_into_blocks(key, key_block)  # keys block by block
    logits = pair_scores(means, blocks.flatten(1, 2).to(dtype), scale=scale)
    logits = logits.masked_fill(~there.flatten(), -torch.inf).unflatten(-1, there.shape).amax(-1)
    kept = logits >= largest.transpose(1, 2)[..., None] - difference
    return to_mask(kept | own | own[:1], query_block=query_block, key_block=key_block)
