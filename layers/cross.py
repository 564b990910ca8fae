"""Cross-attention of DCAL: from the most attended patches to all, and to a second image that distracts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.common.calling import resolve_scale


def rollout_row(
    queries: Sequence[Tensor], keys: Sequence[Tensor], *, row: int = 0, scale: float | None = None
) -> Tensor:
    """A row of the attention rollout, the product of (mean weights + identity) / 2 over all layers (arXiv:2005.00928).

    The row goes back through the layers as a vector, so that one N x N matrix per layer is made and none is kept.

    Args:
        queries, keys: of each layer, first to last, `[B, heads, N, d]`.
        row: of the product: 0 is a class token in front.
        scale: factor on query . key; d ** -0.5 when None.

    Returns:
        `[B, N]`, rows that sum to one.

    Raises:
        ValueError: other numbers of queries than keys, or none.
    """
    if len(queries) != len(keys) or not queries:
        raise ValueError(f"{len(queries)} queries and {len(keys)} keys; expected one of each per layer")
    batch, _, tokens, _ = queries[0].shape
    found = F.one_hot(torch.tensor(row), tokens).to(queries[0]).expand(batch, tokens)
    for q, k in zip(reversed(queries), reversed(keys), strict=True):
        weights = (q @ k.mT * resolve_scale(q, scale)).softmax(-1).mean(1)
        found = (torch.einsum("bn,bnm->bm", found, weights) + found) / 2
    return found


def strongest_tokens(row: Tensor, ratio: float) -> Tensor:
    """The class token and the patches that a row of a rollout weighs most.

    Args:
        row: `[B, N]`, of and with the class token, first.
        ratio: share of the patches, rounded down.

    Returns:
        int64 `[B, 1 + ratio * (N - 1)]`, class token first, patches in descending order.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio} must lie in (0, 1]")
    count = int(ratio * (row.shape[1] - 1))
    best = row[:, 1:].argsort(dim=-1, descending=True, stable=True)[:, :count] + 1
    return torch.cat([torch.zeros_like(best[:, :1]) if count else best.new_zeros(len(best), 1), best], dim=1)


def pairwise_cross_attention(query: Tensor, key: Tensor, value: Tensor, partner: Tensor) -> Tensor:
    """Attention to an image's own tokens and to those of a partner, under one softmax (DCAL's PWCA).

    An image that is its own partner is attended to twice, which a softmax does not see.

    Args:
        query, key, value: `[B, heads, N, d]`.
        partner: other image of each in the batch, int64 `[B]`.

    Returns:
        `[B, heads, N, d]`.
    """
    k, v = (torch.cat([x, x[partner]], dim=2) for x in (key, value))
    return F.scaled_dot_product_attention(query, k, v)
