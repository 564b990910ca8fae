"""FreeSwim (arXiv:2511.14712): windows of the training resolution, moved inwards at the borders."""

from collections.abc import Sequence

import torch

from ..block_sparse.mask import BlockMask
from ..common.calling import PerAxis
from .blocks import block_ends, block_lengths, product_mask
from .registry import published


@published(paper="2511.14712", density="half", exact="exact for block=1, else each block that the window touches")
def freeswim(
    shape: Sequence[int],
    *,
    half: Sequence[int | None],
    block: PerAxis[int] = 8,
    device: torch.device | str | None = None,
) -> BlockMask:
    """FreeSwim's inward window: a query sees the keys at most `half` away along each axis, from a centre that is moved
    so that the window does not leave the grid. Neighborhood attention of window `2 * half + 1`.

    Args:
        shape: tokens of the grid along each axis.
        half: half window in tokens along each axis, None for the whole axis (time). Official: half the height and
            width that the model was trained at.
        block: tokens of a block along each axis. A pair of blocks is kept if any query of one sees any key of the
            other; blocks of one token are the windows themselves.
        device: of the lists; the host when None.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    if len(half) != len(shape) or any(d is not None and d < 0 for d in half):
        raise ValueError(f"half={half!r} must be a number of tokens or None for each axis of shape={tuple(shape)}")
    block = block_lengths("block", block, len(shape))
    relations = []
    for n, d, b in zip(shape, half, block, strict=True):
        first, last = block_ends(n, b)
        if d is None or 2 * d >= n:
            relations.append(torch.ones(len(first), len(first), dtype=torch.bool))
            continue
        low, high = (x.clamp(min=d).clamp(max=n - 1 - d)[:, None] for x in (first, last))  # centres of windows
        relations.append((first <= high + d) & (last >= low - d))
    return product_mask(relations, query_block=block, key_block=block, device=device)
