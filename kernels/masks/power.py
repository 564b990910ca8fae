"""PowerAttention (arXiv:2503.03588): keys at distances that are powers of two."""

from collections.abc import Sequence

import torch

from ..block_sparse.mask import BlockMask
from ..common.calling import PerAxis
from .blocks import block_lengths, static_mask
from .registry import published
from .select import static_blocks


@published(paper="2503.03588", density="local", exact="ours: the code is not public")
def power(
    shape: Sequence[int],
    *,
    local: int = 1,
    block: PerAxis[int] = 8,
    device: torch.device | str | None = None,
) -> BlockMask:
    """Blocks less than `local` away, and those at distance 1, 2, 4, … along one axis, in both directions.

    Lists grow with the logarithm of the grid, and after as many layers as a distance has one bits a block has reached
    it.

    Args:
        shape: tokens of the grid along each axis.
        local: in blocks, at least 1.
        block: tokens of a block along each axis.
        device: of the lists; the host when None.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    block = block_lengths("block", block, len(shape))
    return static_mask(static_blocks(shape, block, "power", local=local), block, block, device)
