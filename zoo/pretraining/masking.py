"""Which patches a model sees: an order of all patches, whose first entries are visible. No boolean masks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Color = Literal["green", "red", "blue", "purple"]


def visible_count(patches: int, ratio: float) -> int:
    """Number of visible patches, int(patches * (1 - ratio)), as in masked autoencoders.

    Raises:
        ValueError: a ratio of which nothing stays visible, or below 0.
    """
    count = int(patches * (1 - ratio))
    if not 0 < count <= patches:
        raise ValueError(f"ratio={ratio} of {patches} patches must leave at least one visible")
    return count


def random_order(batch: int, patches: int, *, generator: torch.Generator | None = None, device=None) -> Tensor:
    """An order per image, int64 `[batch, patches]`."""
    return torch.rand(batch, patches, generator=generator, device=device).argsort(-1)


def restore(order: Tensor) -> Tensor:
    """The place of each patch in an order; gathering by it undoes the order."""
    return order.argsort(-1)


def color_noise(
    count: int,
    side: int,
    kind: Color,
    *,
    sigma: tuple[float, float] = (0.5, 2.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """White noise, filtered by Gaussians, periodic (ColorMAE, arXiv:2407.13036, section 3.2).

    Red is low-pass, blue the rest of it, green a band between two widths, purple all but that band. The widths of the
    released patterns are not public.

    Args:
        count, side: patterns and their pixels a side.
        kind: "green", "red", "blue" or "purple".
        sigma: widths in pixels, ascending; red and blue take the second.

    Returns:
        float32 `[count, side, side]`.

    Raises:
        ValueError: another kind, or widths that do not ascend.
    """
    if kind not in ("green", "red", "blue", "purple"):
        raise ValueError(f"kind={kind!r} must be 'green', 'red', 'blue' or 'purple'")
    if not 0 < sigma[0] < sigma[1]:
        raise ValueError(f"sigma={sigma} must hold two ascending widths above 0")
    frequency = torch.fft.fftfreq(side)
    radius = frequency[:, None] ** 2 + frequency**2
    narrow, wide = (torch.exp(-2 * (torch.pi * s) ** 2 * radius) for s in sigma)  # transforms of Gaussians
    band = narrow - wide
    kept = {"green": band, "red": wide, "blue": 1 - wide, "purple": 1 - band}[kind]
    white = torch.randn(count, side, side, generator=generator)
    return torch.fft.ifft2(torch.fft.fft2(white) * kept).real


def pattern_order(patterns: Tensor) -> Tensor:
    """Order of patches by descending values of a pattern `[B, rows, columns]`."""
    return patterns.flatten(1).argsort(dim=-1, descending=True, stable=True)


def color_order(
    patterns: Tensor, batch: int, grid: tuple[int, int], *, generator: torch.Generator | None = None
) -> Tensor:
    """Orders by one random crop and flip of patterns, the same for all images of the batch, a pattern each.

    Args:
        patterns: as `color_noise` makes them, at least as many as images and as large as the grid.
        batch: images.
        grid: patches along rows and columns.

    Raises:
        ValueError: too few or too small patterns.
    """
    if len(patterns) < batch or patterns.shape[1] < grid[0] or patterns.shape[2] < grid[1]:
        raise ValueError(f"patterns of {tuple(patterns.shape)} are too few or small for {batch} grids of {grid}")
    chosen = patterns[torch.randperm(len(patterns), generator=generator)[:batch].to(patterns.device)]
    draw = lambda n: int(torch.randint(n, (), generator=generator))  # noqa: E731
    top, left = draw(patterns.shape[1] - grid[0] + 1), draw(patterns.shape[2] - grid[1] + 1)
    window = chosen[:, top : top + grid[0], left : left + grid[1]]
    axes = [axis for axis in (1, 2) if draw(2)]
    return pattern_order(window.flip(axes) if axes else window)


def hard_order(scores: Tensor, ratio: float, progress: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Orders in which the hardest patches are masked, and others at random (HPM, arXiv:2304.05919, section 3.3).

    Args:
        scores: predicted loss per patch `[B, N]`.
        ratio: of masked patches.
        progress: share of the training that is done: of the masked patches int(masked * progress / 2) are the hardest.

    Raises:
        ValueError: progress out of [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress={progress} must lie in [0, 1]")
    patches = scores.shape[1]
    hardest = int((patches - visible_count(patches, ratio)) * 0.5 * progress)
    key = torch.rand(scores.shape, generator=generator).to(scores.device)
    if hardest:
        key = key.scatter(1, scores.topk(hardest, dim=-1).indices, 2.0)  # behind all others
    return key.argsort(-1)
