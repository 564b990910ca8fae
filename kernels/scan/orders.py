"""Orders in which a scan visits the tokens of a grid."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..common.arguments import operator
from ..common.calling import Mask
from ..masks.orders import axis_order, gilbert_order, inverse_order

Order = Literal["rows", "columns", "snake_rows", "snake_columns", "gilbert", "segments"]


def _snake(places: Tensor) -> Tensor:
    """Raster numbers so that each line starts where the one before it ended, on any number of axes."""
    if places.dim() == 1:
        return places
    lines = [_snake(x) for x in places]
    return torch.cat([line if i % 2 == 0 else line.flip(0) for i, line in enumerate(lines)])


def _by_segment(segments: Tensor) -> Tensor:
    """Tokens of a segment one after the other, segments by where their first token stands."""
    labels = segments.flatten()
    _, member = labels.unique(return_inverse=True)
    places = torch.arange(labels.numel(), device=labels.device)
    first = torch.full_like(places, labels.numel()).scatter_reduce(0, member, places, "amin")
    return first[member].argsort(stable=True)


@operator
def scan_order(shape: Sequence[int], kind: str, *, segments: Mask | None = None) -> tuple[Tensor, Tensor]:
    """An order of the tokens of a grid, and its inverse.

    `x.flatten(1, -3)[:, order]` lays tokens `[B, *shape, heads, d]` out for `scan_attention`, `[:, inverse]` lays them
    back. Of an order and its reverse, `direction="both"` takes both.

    Args:
        shape: tokens along each axis.
        kind: "rows", the raster order, and "columns", that of the axes in reverse. "snake_rows" and "snake_columns":
            every second line backwards, so that consecutive tokens are neighbours; columns begin at the last row
            (LaMamba-Diff, arXiv:2408.02615, as published). "gilbert", a space-filling curve of 2 or 3 axes.
            "segments": tokens by segment, segments by their first token (DocMamba, arXiv:2409.11887).
        segments: `shape`, integers: the segment of each token; with kind="segments" only.

    Returns:
        order, inverse: int64 `[tokens]`.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
    """
    if not shape or min(shape) < 1:
        raise ValueError(f"shape={tuple(shape)} must hold at least one axis, each of at least one token")
    if kind not in get_args(Order):
        raise ValueError(f"kind={kind!r} must be one of {get_args(Order)}")
    if (segments is None) == (kind == "segments"):
        raise ValueError(f"segments must be given with kind='segments' and with no other; kind={kind!r}")
    raster = torch.arange(torch.Size(shape).numel()).view(*shape)
    if kind.endswith("columns") and len(shape) < 2:
        raise ValueError(f"kind={kind!r} needs two axes or more; shape={tuple(shape)}")
    if segments is not None:
        if segments.shape != raster.shape:
            raise ValueError(f"segments.shape={tuple(segments.shape)} must be shape={tuple(shape)}")
        order = _by_segment(segments)
    elif kind == "gilbert":
        order = gilbert_order(shape)
    elif kind == "columns":
        order = axis_order(shape, list(reversed(range(len(shape)))))
    elif kind == "snake_rows":
        order = _snake(raster)
    elif kind == "snake_columns":
        order = _snake(raster.flip(-2).transpose(-1, -2))
    else:
        order = raster.flatten()
    return order, inverse_order(order)
