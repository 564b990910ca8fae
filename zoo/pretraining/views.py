"""Second views of images: turned, moved and with another contrast, each image by its own random numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def second_view(
    images: Tensor,
    *,
    degrees: float = 0.0,
    shift: float = 0.0,
    jitter: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Other views of images, reflected at the borders.

    Args:
        images: `[B, C, H, W]`.
        degrees: largest turn to either side.
        shift: largest move along each axis, as a share of the side.
        jitter: largest change of contrast, and of brightness in standard deviations of the image.
        generator: of the CPU; torch's own when None.

    Returns:
        `[B, C, H, W]`.

    Raises:
        ValueError: a negative number.
    """
    if min(degrees, shift, jitter) < 0:
        raise ValueError(f"degrees={degrees}, shift={shift} and jitter={jitter} must not be negative")
    draws = 2 * torch.rand(len(images), 5, generator=generator) - 1
    angle, across, along, contrast, brightness = draws.to(images).unbind(1)
    turn = torch.deg2rad(degrees * angle)
    rows = [[turn.cos(), -turn.sin(), 2 * shift * across], [turn.sin(), turn.cos(), 2 * shift * along]]
    matrices = torch.stack([torch.stack(row, -1) for row in rows], 1)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    mean, deviation = moved.mean((1, 2, 3), keepdim=True), moved.std((1, 2, 3), keepdim=True)
    contrast, brightness = (jitter * x.view(-1, 1, 1, 1) for x in (contrast, brightness))
    return (moved - mean) * (1 + contrast) + mean + brightness * deviation
