"""NABLA (arXiv:2507.13546): the blocks that hold most of the pooled attention, and a window that never goes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..block_sparse.mask import BlockMask, boxes
from ..common.calling import PerAxis, per_axis
from .blocks import block_lengths, check_query_key, outer_and, own_or_none, product_mask, to_mask
from .registry import published
from .select import block_scores, keep


def _window(counts: Sequence[int], window: PerAxis[int]) -> list[Tensor]:
    """Blocks at most `window // 2` away, along every axis; windows are cut at the border."""
    widths = per_axis("window", window, len(counts), int)
    if any(n < 1 for n in widths):
        raise ValueError(f"window={window!r} must be at least 1 block along each axis")
    places = [torch.arange(n) for n in counts]
    return [(x[:, None] - x).abs() <= width // 2 for x, width in zip(places, widths, strict=True)]


@published(paper="2507.13546", density="window")
def nabla_prior(
    shape: Sequence[int],
    *,
    window: PerAxis[int],
    block: PerAxis[int] = (1, 8, 8),
    device: torch.device | str | None = None,
) -> BlockMask:
    """The static part of NABLA: blocks at most `window // 2` away along each axis.

    Args:
        shape: tokens of the grid along each axis.
        window: blocks along each axis.
        block: tokens of a block along each axis. Official: 8 × 8 patches of one frame.
        device: of the lists; the host when None.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    block = block_lengths("block", block, len(shape))
    return product_mask(_window(boxes(shape, block), window), query_block=block, key_block=block, device=device)


@published(paper="2507.13546", density="mass")
def nabla(
    query: Tensor,
    key: Tensor,
    *,
    mass: float = 0.9,
    window: PerAxis[int] | None = None,
    block: PerAxis[int] = (1, 8, 8),
    own: bool = True,
) -> BlockMask:
    """NABLA: the fewest blocks whose share of the softmax of mean query times mean key reaches `mass`, and the blocks
    of `nabla_prior`.

    Args:
        query, key: `[B, *spatial, heads, d]`, `[B, *key_spatial, key_heads, d]`.
        mass: in [0, 1]. Official: 0.9.
        window: of the prior, for queries and keys of one grid; None for none.
        block: tokens of a block along each axis.
        own: keep the own block besides; a window has it anyway.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    block = block_lengths("block", block, check_query_key(query, key))
    always = own_or_none(query, key, block, block, own)
    if window is not None:
        if query.shape[1:-2] != key.shape[1:-2]:
            raise ValueError(f"window={window!r} needs queries and keys of one grid")
        always = outer_and(_window(boxes(query.shape[1:-2], block), window)).to(query.device)
    weights = block_scores(query, key, query_block=block, key_block=block).softmax(-1)
    return to_mask(keep(weights, rule="mass", mass=mass, always=always), query_block=block, key_block=block)
