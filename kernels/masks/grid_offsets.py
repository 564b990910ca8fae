"""Grid heads of MMInference (arXiv:2504.16083): keys at offsets that repeat with a stride."""

from collections.abc import Sequence

import torch

from ..block_sparse.mask import BlockMask
from ..common.calling import PerAxis
from .blocks import block_lengths, differences, product_mask
from .registry import published


@published(paper="2504.16083", density="stride", exact="ours: the code is not public; exact for block=1")
def grid_offsets(
    shape: Sequence[int],
    *,
    stride: Sequence[int | None],
    offsets: Sequence[Sequence[int]] | None = None,
    block: PerAxis[int] = 1,
    device: torch.device | str | None = None,
) -> BlockMask:
    """A query sees a key where, along every axis, `(key - query) mod stride` is one of the offsets.

    A stride of the whole axis with offset 0 is the same row, column or frame; `(None, H, W)` is temporal attention, so
    a stride of H·W in raster order.

    Args:
        shape: tokens of the grid along each axis.
        stride: in tokens along each axis, None for all keys of the axis.
        offsets: for each axis, offset 0 included: a query sees itself. None: only 0.
        block: tokens of a block along each axis; a pair of blocks is kept if any query of one sees any key of the
            other, so blocks should be 1 along axes with a stride.
        device: of the lists; the host when None.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    offsets = [[0]] * len(shape) if offsets is None else offsets
    if len(stride) != len(shape) or len(offsets) != len(shape) or any(s is not None and s < 1 for s in stride):
        raise ValueError(f"stride={stride!r} and offsets={offsets!r} must have one entry an axis of {tuple(shape)}")
    if any(0 not in some for some in offsets):
        raise ValueError(f"offsets={offsets!r} must hold 0 along each axis: a query sees itself")
    block = block_lengths("block", block, len(shape))
    relations = []
    for n, step, some, b in zip(shape, stride, offsets, block, strict=True):
        least, most = differences(n, b, b)
        seen, step = torch.zeros_like(least, dtype=torch.bool), step or 1
        for offset in some:  # whether a multiple of the stride lies between
            seen |= (most - offset).div(step, rounding_mode="floor") * step >= least - offset
        relations.append(seen)
    return product_mask(relations, query_block=block, key_block=block, device=device)
