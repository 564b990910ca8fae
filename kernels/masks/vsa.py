"""VSA (arXiv:2505.13389): cubes attend to the cubes of the most similar means, and to all means."""

from math import ceil

import torch
from torch import Tensor

from ..block_sparse.mask import BlockMask
from ..common.calling import PerAxis, resolve_scale
from .blocks import block_lengths, block_means, check_query_key, most_own, own_or_none, spread_blocks, to_mask
from .registry import published
from .select import block_scores, keep, pair_scores


@published(paper="2505.13389", density="sparsity")
def vsa(
    query: Tensor,
    key: Tensor,
    *,
    sparsity: float = 0.9,
    block: PerAxis[int] = 4,
    own: bool = True,
) -> BlockMask:
    """The fine branch of video sparse attention: every cube of queries keeps the `ceil((1 - sparsity) * cubes)` cubes
    of keys whose mean has the largest product with its own mean.

    The layer is `block_sparse_attention(query, key, value, mask=vsa(query, key)) + gate * vsa_coarse(query, key,
    value)`. Cubes at the border are short, of any grid.

    Args:
        query, key: `[B, *spatial, heads, d]`, `[B, *key_spatial, key_heads, d]`.
        sparsity: share of the cubes left out, in [0, 1]. Official: 0.8 to 0.9, from 0 up by 0.03 every 50 steps.
        block: tokens of a cube along each axis.
        own: keep the own cube besides; False is the published selection.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity!r} must lie in [0, 1]")
    block = block_lengths("block", block, check_query_key(query, key))
    scores = block_scores(query, key, query_block=block, key_block=block)
    topk = max(1, ceil((1 - sparsity) * scores.shape[-1]))
    kept = keep(scores, rule="topk", topk=topk, always=own_or_none(query, key, block, block, own))
    return to_mask(kept, query_block=block, key_block=block, most=topk + most_own(block, block))


def vsa_coarse(
    query: Tensor, key: Tensor, value: Tensor, *, block: PerAxis[int] = 4, scale: float | None = None
) -> Tensor:
    """The coarse branch: attention of the cubes' means, given to every token of the cube. Differentiable.

    Args:
        query, key, value: as of `block_sparse_attention`.
        block: tokens of a cube along each axis.
        scale: factor on query . key; d ** -0.5 when None.

    Returns:
        `[B, *spatial, heads, value_dim]` in the dtype of query.
    """
    block = block_lengths("block", block, check_query_key(query, key))
    scale = resolve_scale(query, scale)
    means = [block_means(x, block) for x in (query, key, value)]
    weights = pair_scores(means[0], means[1], scale=scale).softmax(-1)  # [B, heads, cubes, cubes]
    values = means[2].repeat_interleave(query.shape[-2] // value.shape[-2], dim=-2)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    return spread_blocks(out, query.shape[1:-2], block).to(query.dtype)
