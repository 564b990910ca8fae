"""Blocks of tokens that are alike: hashed (HyperAttention, arXiv:2310.05869) or clustered (arXiv:2003.05997)."""

from typing import Literal

import torch
from torch import Tensor

from ..block_sparse.mask import BlockMask
from .blocks import check_query_key, to_mask
from .orders import content_order, inverse_order
from .registry import published


def lay_out(x: Tensor, order: Tensor) -> Tensor:
    """Tokens `[B, tokens, heads, d]` in an order `[B, heads, tokens]` of every head. Differentiable."""
    return x.gather(1, order.transpose(1, 2)[..., None].expand(*x.shape[:3], x.shape[-1]))


@published(paper="2310.05869", density="band", exact="sorted blocks; without the sampled rest")
def content_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block: int = 256,
    band: int = 1,
    kind: Literal["lsh", "kmeans"] = "kmeans",
    clusters: int = 16,
    directions: Tensor | None = None,
) -> tuple[BlockMask, Tensor, Tensor, Tensor, Tensor]:
    """Attention among tokens that are alike: queries and keys are sorted by hash or cluster, and blocks of queries
    attend to the blocks of keys less than `band` away in the sorted sequences.

    Args:
        query, key, value: `[B, tokens, heads, d]`, as many tokens and heads; a grid is flattened.
        block: tokens of a block.
        band: in blocks, at least 1.
        kind, clusters, directions: see `content_order`.

    Returns:
        The mask, then query, key and value in their orders, for `block_sparse_attention(query, key, value, mask=mask)`.
        the order `[B, heads, tokens]` in which `lay_out(output, order)` brings the output back.

    Raises:
        ValueError: an argument outside what is accepted.
    """
    if check_query_key(query, key) != 1 or query.shape[:3] != key.shape[:3] or band < 1:
        raise ValueError(
            f"query.shape={tuple(query.shape)} and key.shape={tuple(key.shape)} must be [B, tokens, heads, d] of "
            f"as many tokens and heads, band={band!r} at least 1"
        )
    by_query, by_key, *_ = content_order(query, key, kind=kind, clusters=clusters, directions=directions)
    number = torch.arange(-(-query.shape[1] // block), device=query.device)
    near = (number[:, None] - number).abs() < band
    mask = to_mask(near, query_block=(block,), key_block=(block,), most=2 * band - 1)
    return mask, lay_out(query, by_query), lay_out(key, by_key), lay_out(value, by_key), inverse_order(by_query)
