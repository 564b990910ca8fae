"""CLEAR (arXiv:2412.16112): queries attend to the keys of a circle around them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..block_sparse.mask import BlockMask
from ..common.calling import PerAxis
from .blocks import block_lengths, block_tokens, cut_into_blocks, nearer, product_mask
from .registry import published


@published(paper="2412.16112", density="radius", exact="exact for block=1, else each block that the circle touches")
def clear(
    shape: Sequence[int],
    *,
    radius: int,
    block: PerAxis[int] = 8,
    device: torch.device | str | None = None,
) -> BlockMask:
    """CLEAR: a query attends to keys less than `radius` away, `dy² + dx² < radius²`; circles are cut at the border.

    Text is `additional_keys` of the kernel, seen by everybody.

    Args:
        shape: tokens of the grid along each axis, 1 to 3 axes.
        radius: in tokens, at least 1. Official: 8, 16 or 32.
        block: tokens of a block along each axis. A pair of blocks is kept if any query of one sees any key of the
            other; blocks of one token are the circles themselves.
        device: of the lists; the host when None.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    if radius < 1:
        raise ValueError(f"radius={radius!r} must be at least 1 token: a query sees itself")
    block = block_lengths("block", block, len(shape))
    relations = [nearer(n, radius, b, b) for n, b in zip(shape, block, strict=True)]

    def nearest(queries: list[Tensor], keys: list[Tensor]) -> Tensor:
        """Return whether the nearest two tokens of two blocks see each other."""
        gaps = [((q - k).abs() * b - b + 1).clamp(min=0) for q, k, b in zip(queries, keys, block, strict=True)]
        return torch.stack([gap * gap for gap in gaps]).sum(0) < radius * radius

    return product_mask(relations, query_block=block, key_block=block, where=nearest, device=device)


def clear_pooled(x: Tensor, weight: Tensor) -> Tensor:
    """Pooled keys or values of CLEAR's variant with down-sampling, additional ones that every image query sees.

    Args:
        x: keys after rotary positions, or values, `[B, H, W, heads, d]`.
        weight: `[p, p]`, learned, 1 / p² at first, the same for keys and values.

    Returns:
        `[B, patches, heads, d]`, weighted sums of patches of p × p. Short patches at the border are scaled up by
        p² / tokens.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.dim() != 5 or weight.dim() != 2:
        raise ValueError(
            f"x.shape={tuple(x.shape)} must be [B, H, W, heads, d], weight.shape={tuple(weight.shape)} 2-D"
        )
    tokens, _ = cut_into_blocks(x, weight.shape)  # [B, patches, p², heads, d]
    existing = block_tokens(x.shape[1:3], weight.shape, x.device)
    share = weight.flatten().to(x.dtype) * (weight.numel() / existing)[:, None].to(x.dtype)
    return torch.einsum("bnthd,nt->bnhd", tokens, share)
