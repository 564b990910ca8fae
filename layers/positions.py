"""Embeddings of positions that were learnt for a map of one size, on maps of others."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.common.symbolic import known


def resize_positions(table: Tensor, grid_size: Sequence[int], new_size: Sequence[int], prefix: int = 0) -> Tensor:
    """Position embedding for a map of another size, bicubic in float32.

    Args:
        table: `[1, prefix + H * W, C]`.
        grid_size: H and W.
        new_size: the same of the result.
        prefix: leading tokens without a place on the map, such as a class token; they are kept.

    Returns:
        `[1, prefix + new H * new W, C]` in the dtype of table, which itself is returned when the size is right.
    """
    if all(known(old == new) for old, new in zip(grid_size, new_size, strict=True)):
        return table
    maps = table[:, prefix:].float().unflatten(1, tuple(grid_size)).permute(0, 3, 1, 2)
    resized = F.interpolate(maps, size=tuple(new_size), mode="bicubic", align_corners=False)
    tokens = resized.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return torch.cat([table[:, :prefix], tokens], dim=1) if prefix else tokens
