"""Masks and boxes on the grids of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def to_grid(masks: Tensor, grid: Sequence[int], *, mode: str = "nearest-exact") -> Tensor:
    """Masks on the tokens of a grid.

    Args:
        masks: `[..., height, width]` for images, `[..., frames, height, width]` for a grid of three axes, where masks
            of two axes serve all frames. Bool or float, of any size.
        grid: tokens along (h, w) or (t, h, w).
        mode: of `torch.nn.functional.interpolate`.

    Returns:
        float32 `[..., tokens]` in raster order.

    Raises:
        ValueError: masks without the axes of the grid.
    """
    grid = tuple(grid)
    if masks.dim() < 2:
        raise ValueError(f"masks of {tuple(masks.shape)} must be [..., height, width] for the grid {grid}")
    if len(grid) == 3 and masks.dim() == 2:
        masks = masks.expand(grid[0], *masks.shape)
    if masks.dim() < len(grid):
        raise ValueError(f"masks of {tuple(masks.shape)} must have the axes of the grid {grid}")
    leading = masks.shape[: -len(grid)]
    x = masks.float().reshape(1, prod(leading), *masks.shape[-len(grid) :])
    if x.shape[2:] != grid:
        x = interpolate(x, size=grid, mode=mode)
    return x.reshape(*leading, prod(grid))


def regions_to_grid(masks: Tensor, grid: Sequence[int], *, mode: str = "nearest-exact") -> Tensor:
    """Masks of regions on the tokens of a grid.

    Args:
        masks: `[regions, height, width]`, for all frames alike, or `[regions, frames, height, width]`. Of any size.
        grid: tokens along (h, w) or (t, h, w).
        mode: of `torch.nn.functional.interpolate`.

    Returns:
        float32 `[regions, tokens]` in raster order.

    Raises:
        ValueError: masks of other axes, or with frames on a grid without.
    """
    check_regions(masks)
    if masks.dim() == 4 and len(grid) == 2:
        raise ValueError(f"masks of {tuple(masks.shape)} have frames, the grid {tuple(grid)} of an image has none")
    if masks.dim() == 3 and len(grid) == 3:
        masks = masks[:, None].expand(-1, grid[0], -1, -1)
    return to_grid(masks, grid, mode=mode)


def check_regions(masks: Tensor) -> None:
    """Raises ValueError unless masks are `[regions, height, width]` or `[regions, frames, height, width]`."""
    if masks.dim() not in (3, 4):
        raise ValueError(
            f"masks of {tuple(masks.shape)} must be [regions, height, width], or with frames before height"
        )


def box_mask(box: Sequence[float], size: Sequence[int], *, pixels: Sequence[int] | None = None) -> Tensor:
    """Mask of a box, bool `[height, width]`, True inside.

    Args:
        box: (left, top, right, bottom), as fractions of the image, or in pixels of `pixels`.
        size: height and width of the mask. A cell is inside when its center is; a box between centers takes one cell.
        pixels: height and width of the image that the box counts in.

    Raises:
        ValueError: a box that is empty or outside of the image.
    """
    left, top, right, bottom = (float(x) for x in box)
    height, width = (1.0, 1.0) if pixels is None else (float(x) for x in pixels)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        unit = "fractions" if pixels is None else f"pixels of {tuple(pixels)}"
        raise ValueError(f"box={tuple(box)} must be (left, top, right, bottom) inside of the image, in {unit}")

    def inside(count: int, first: float, end: float) -> Tensor:
        centers = (torch.arange(count) + 0.5) / count
        found = (centers >= first) & (centers < end)
        if not found.any():
            found[min(int((first + end) / 2 * count), count - 1)] = True
        return found

    rows, columns = inside(size[0], top / height, bottom / height), inside(size[1], left / width, right / width)
    return rows[:, None] & columns


def box_track(boxes: Sequence[Sequence[float]], size: Sequence[int]) -> Tensor:
    """Masks of a box in every frame, bool `[frames, height, width]`; see `box_mask`."""
    return torch.stack([box_mask(box, size) for box in boxes])


def gaussian_blur(x: Tensor, size: int, sigma: float) -> Tensor:
    """Blurs maps `[..., height, width]` by a Gaussian of size x size, edges repeated.

    Raises:
        ValueError: an even size.
    """
    if size % 2 == 0:
        raise ValueError(f"size={size} must be odd")
    kernel = torch.exp(-0.5 * ((torch.arange(size, device=x.device, dtype=x.dtype) - size // 2) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = x.reshape(-1, 1, *x.shape[-2:])
    half = size // 2
    flat = torch.nn.functional.pad(flat, (half, half, half, half), mode="replicate")
    flat = torch.nn.functional.conv2d(flat, kernel[None, None, :, None])
    return torch.nn.functional.conv2d(flat, kernel[None, None, None]).reshape(x.shape)


def normalize(maps: Tensor, how: str, axes: Sequence[int] = (-2, -1)) -> Tensor:
    """Maps scaled over some axes: "max" divides by the maximum, "minmax" goes to 0..1, "none" leaves them.

    Raises:
        ValueError: an unknown rule.
    """
    axes = tuple(axes)
    if how == "none":
        return maps
    if how not in ("max", "minmax"):
        raise ValueError(f"normalize={how!r} must be 'max', 'minmax' or 'none'")
    low = maps.amin(axes, keepdim=True) if how == "minmax" else torch.zeros_like(maps.amin(axes, keepdim=True))
    span = maps.amax(axes, keepdim=True) - low
    return (maps - low) / span.masked_fill(span == 0, 1)  # a map of zeros stays one
