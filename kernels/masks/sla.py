"""SLA (arXiv:2509.24006): the most important blocks exactly, and linear attention beside them."""

import torch
from torch import Tensor

from ..block_sparse.mask import BlockMask
from ..common.calling import PerAxis, without_autocast
from .blocks import block_means, check_blocks, check_query_key, most_own, own_or_none, to_mask
from .registry import published
from .select import keep, pair_scores


@published(paper="2509.24006", density="ratio")
def sla(
    query: Tensor,
    key: Tensor,
    *,
    ratio: float = 0.1,
    query_block: PerAxis[int] = 128,
    key_block: PerAxis[int] = 64,
    own: bool = True,
) -> BlockMask:
    """The sparse branch of SLA: every block of queries keeps the `max(1, int(ratio * blocks))` blocks of keys whose
    mean, less the mean of all keys, has the largest product with its mean.

    The layer is `block_sparse_attention(…, mask=sla(query, key)) + proj(sla_linear(query, key, value))` with `proj` a
    learned d × d map, zero at first.

    Args:
        query, key: `[B, *spatial, heads, d]`, `[B, *key_spatial, key_heads, d]`.
        ratio: in (0, 1]. Official: 0.1 to 0.5.
        query_block, key_block: tokens of a block along each axis.
        own: keep the own blocks besides; False is the published selection.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio!r} must lie in (0, 1]")
    query_block, key_block = check_blocks(query, key, query_block, key_block)
    with torch.no_grad():
        dtype = torch.promote_types(key.dtype, torch.float32)
        centre = key.mean(dim=tuple(range(1, key.dim() - 2)), dtype=dtype)[:, None]
        means = block_means(query, query_block), block_means(key, key_block) - centre
        scores = pair_scores(*means, scale=query.shape[-1] ** -0.5)
        topk = max(1, int(ratio * scores.shape[-1]))
        always = own_or_none(query, key, query_block, key_block, own)
        kept = keep(scores, rule="topk", topk=topk, always=always)
    most = topk + most_own(query_block, key_block)
    return to_mask(kept, query_block=query_block, key_block=key_block, most=most)


def sla_linear(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The linear branch: with φ the softmax over channels, `φ(q) (Σ φ(k) vᵀ) / (φ(q) · Σ φ(k))`. Differentiable.

    Args:
        query, key, value: as of `block_sparse_attention`.

    Returns:
        `[B, *spatial, heads, value_dim]` in the dtype of query.
    """
    check_query_key(query, key)
    dtype, group = torch.promote_types(query.dtype, torch.float32), query.shape[-2] // key.shape[-2]
    q = query.flatten(1, -3).softmax(-1, dtype=dtype)
    k = key.flatten(1, -3).softmax(-1, dtype=dtype)
    with without_autocast(query.device):
        state = torch.einsum("bnhd,bnhe->bhde", k, value.flatten(1, -3).to(dtype)).repeat_interleave(group, dim=1)
        total = k.sum(1).repeat_interleave(group, dim=1)  # [B, heads, d]
        out = torch.einsum("bnhd,bhde->bnhe", q, state) / torch.einsum("bnhd,bhd->bnh", q, total)[..., None]
    return out.unflatten(1, query.shape[1:-2]).to(query.dtype)
