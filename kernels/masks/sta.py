"""Sliding tile attention (arXiv:2502.04507): tiles attend to a window of tiles."""

from collections.abc import Sequence

import torch

from ..block_sparse.mask import BlockMask, boxes
from ..common.calling import PerHead, is_per_head, per_axis
from .blocks import block_lengths, product_mask, stack_heads
from .registry import published


def tile_window(count: int, window: int) -> torch.Tensor:
    """Tiles of one axis that see each other, bool `[count, count]`: at most `window // 2` away from the tile's own
    number, which is moved inwards so that the window lies inside. An even window has one tile more."""
    half, number = window // 2, torch.arange(count)
    centre = number.clamp(min=half).clamp(max=count - 1 - half)
    return (centre[:, None] - number).abs() <= half


@published(paper="2502.04507", density="window")
def sta(
    shape: Sequence[int],
    *,
    window: PerHead[int] = (3, 3, 3),
    tile: int | Sequence[int] = (6, 8, 8),
    device: torch.device | str | None = None,
) -> BlockMask:
    """Sliding tile attention: a tile of queries attends to the `window` of tiles around it, always inside the grid.

    With odd windows on grids that tiles divide, neighborhood attention of window `window * tile` and stride `tile`. The
    official kernels take three grids; here the last tiles of any grid are short.

    Args:
        shape: tokens of the grid along each axis.
        window: tiles along each axis, or one such window for each head. An even number counts as the next odd one, as
            in the official masks; windows larger than the grid see all of it.
        tile: tokens of a tile along each axis.
        device: of the lists; the host when None.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    rank = len(shape)
    tile = block_lengths("tile", tile, rank)
    windows = list(window) if is_per_head(window) else [window]  # pyright: ignore[reportArgumentType]
    masks = []
    for one in windows:
        lengths = per_axis("window", one, rank, int)
        if any(n < 1 for n in lengths):
            raise ValueError(f"window={one!r} must be at least 1 tile along each axis")
        relations = [tile_window(n, w) for n, w in zip(boxes(shape, tile), lengths, strict=True)]
        masks.append(product_mask(relations, query_block=tile, key_block=tile, device=device))
    return stack_heads(masks)
