"""SpargeAttn (arXiv:2502.18137), first stage: blocks of similar tokens are chosen by their means, others are kept."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..block_sparse.mask import BlockMask
from ..common.calling import PerAxis
from .blocks import block_means, block_tokens, check_blocks, own_or_none, to_mask
from .registry import published
from .select import keep, pair_scores


def self_similarity(x: Tensor, block: tuple[int, ...]) -> Tensor:
    """Mean cosine of all pairs of tokens of a block, `[B, heads, blocks]`: the squared length of the mean direction."""
    directions = normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
    return block_means(directions, block).square().sum(-1).transpose(1, 2)


@published(paper="2502.18137", density="mass or topk")
@torch.no_grad()
def sparge(
    query: Tensor,
    key: Tensor,
    *,
    mass: float | None = None,
    topk: float | None = None,
    similarity: float = -0.1,
    sink: bool = False,
    query_block: PerAxis[int] = 128,
    key_block: PerAxis[int] = 64,
    short_kept: bool = True,
    causal: bool = False,
    own: bool = True,
) -> BlockMask:
    """SpargeAttn's selection: of the softmax of mean query times mean key the highest blocks whose sum stays within
    `mass`, at least one, or the share `topk`; blocks whose tokens are not alike are kept, and see everything.

    Its second stage, tiles skipped inside the kernel, is not a mask.

    Args:
        query, key: `[B, *spatial, heads, d]`, `[B, *key_spatial, key_heads, d]`.
        mass: in [0, 1].
        topk: share of the blocks of keys, rounded down, at least one. 0.5 if neither is given.
        similarity: mean cosine inside a block above which its mean stands for it. Official: -0.1 with topk 0.5, 0.6
            with mass 0.98.
        sink: keep the first block of keys.
        query_block, key_block: tokens of a block along each axis.
        short_kept: treat short blocks at the border as not alike, as the official code does; better False where many
            blocks are short.
        causal: one axis: drop blocks of keys that begin behind the block of queries. Tokens inside the others are not
            ordered by lists.
        own: keep the own blocks besides; False is the published selection.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    if mass is not None and topk is not None:
        raise ValueError(f"mass={mass!r} and topk={topk!r}: give one of them")
    query_block, key_block = check_blocks(query, key, query_block, key_block)
    if causal and (len(query_block) != 1 or query.shape[1] != key.shape[1]):
        raise ValueError(f"causal=True needs one axis, the same for queries and keys; query.shape={tuple(query.shape)}")
    alike = []
    for x, block in ((query, query_block), (key, key_block)):
        whole = block_tokens(x.shape[1:-2], block, x.device) == block_tokens(block, block, x.device)
        alike.append((self_similarity(x, block) > similarity) & (whole | (not short_kept)))
    alike[1] = alike[1].repeat_interleave(query.shape[-2] // key.shape[-2], dim=1)
    scores = pair_scores(block_means(query, query_block), block_means(key, key_block), scale=query.shape[-1] ** -0.5)
    columns = alike[1][:, :, None]
    always, allowed = ~columns | ~alike[0][..., None], columns
    if causal:
        last, first = (torch.arange(n, device=query.device) for n in scores.shape[-2:])
        past = first * key_block[0] < (last[:, None] + 1) * query_block[0]
        allowed = columns & past
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sink:
        always = always | (torch.arange(scores.shape[-1], device=scores.device) == 0)
    if (near := own_or_none(query, key, query_block, key_block, own)) is not None:
        always = always | near
    if mass is None:
        number = max(1, int((0.5 if topk is None else topk) * scores.shape[-1]))
        kept = keep(scores, rule="topk", topk=number, allowed=allowed, always=always)
    else:
        weights = scores.softmax(-1).nan_to_num(0)  # rows without similar keys
        kept = keep(weights, rule="mass", mass=mass, mass_crossing=False, allowed=allowed, always=always)
    kept = kept & past if causal else kept
    return to_mask(kept, query_block=query_block, key_block=key_block)
