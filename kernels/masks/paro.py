"""PAROAttention (arXiv:2506.16054): blocks that are contiguous in the order of axes that suits a head."""

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from ..block_sparse.mask import BlockMask
from .blocks import block_tokens, check_query_key, own_or_none, to_mask
from .registry import published
from .select import block_scores, keep


def paro_block(shape: Sequence[int], order: Sequence[int], tokens: int) -> tuple[int, ...]:
    """The block of about `tokens` tokens that is filled along the axes in order, the last of them first.

    Tokens that follow each other in the order `(1, 2, 0)` of (T, H, W) are those of one place in consecutive frames:
    blocks of a grid say the same without moving tokens.

    Raises:
        ValueError: not a permutation of the axes.
    """
    if sorted(order) != list(range(len(shape))) or tokens < 1:
        raise ValueError(f"order={tuple(order)} must permute the axes of {tuple(shape)}, tokens={tokens} be at least 1")
    block = [1] * len(shape)
    for axis in reversed(order):
        block[axis] = min(shape[axis], tokens)
        tokens = max(1, tokens // block[axis])
    return tuple(block)


@published(paper="2506.16054", density="mass", exact="ours: the score of an order is not public")
def paro(
    query: Tensor,
    key: Tensor,
    *,
    order: Sequence[int] | None = None,
    tokens: int = 64,
    mass: float = 0.9,
    own: bool = True,
) -> BlockMask:
    """A mask to be calibrated once and used at every step: in blocks of one order of axes, the fewest whose share of
    the softmax of mean query times mean key reaches `mass`.

    Args:
        query, key: `[B, *spatial, heads, d]` of one grid, of the heads that share `order`; see `paro_orders`.
        order: of the axes, the last of them fastest; None for raster order.
        tokens: of a block, about.
        mass: in [0, 1].
        own: keep the own block besides.

    Raises:
        ValueError: an argument outside what is accepted.
    """
    rank = check_query_key(query, key)
    block = paro_block(query.shape[1:-2], range(rank) if order is None else order, tokens)
    weights = block_scores(query, key, query_block=block, key_block=block).softmax(-1)
    kept = keep(weights, rule="mass", mass=mass, always=own_or_none(query, key, block, block, own))
    return to_mask(kept, query_block=block, key_block=block)


@torch.no_grad()
def paro_orders(query: Tensor, key: Tensor, *, tokens: int = 64, mass: float = 0.9) -> tuple[list, Tensor, Tensor]:
    """The order of axes in which a head needs the fewest pairs of tokens for `mass`.

    Returns:
        all orders, tuples of axes.
        the best one of every head, int64 `[heads]`, a number in that list, ties to the first.
        the share of the pairs that each keeps, `[orders, heads]`, the mean over the batch.
    """
    rank, shape = check_query_key(query, key), tuple(query.shape[1:-2])
    orders, shares = list(permutations(range(rank))), []
    for order in orders:
        block = paro_block(shape, order, tokens)
        weights = block_scores(query, key, query_block=block, key_block=block).softmax(-1)
        size = block_tokens(shape, block, query.device).to(weights.dtype)
        kept = keep(weights, rule="mass", mass=mass).to(weights.dtype)
        shares.append((kept @ size @ size).mean(0) / size.sum() ** 2)
    table = torch.stack(shares)
    return orders, table.argmin(0), table
