"""Latents of one branch kept from another outside of a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from ...sites import Schedule
from ...sites.schedule import Moment
from ..edit import Edit
from ..regions import to_grid
from ..rows import Rows


def blend_masks(maps: Tensor, size: Sequence[int], *, threshold: float = 0.3, pool: int = 1) -> Tensor:
    """Masks of Prompt-to-Prompt's local blend, each joined with that of the first row.

    Args:
        maps: sums of maps of the words, `[prompts, height, width]`.
        size: height and width of the latents.
        threshold: of the maps divided by their maxima.
        pool: neighbors on each side of which the maximum is taken; 0 for none.

    Returns:
        bool `[prompts, *size]`.
    """
    maps = maps[:, None]
    if pool:
        maps = max_pool2d(maps, 2 * pool + 1, stride=1, padding=pool)
    maps = interpolate(maps, size=tuple(size))[:, 0]
    highest = maps.amax((-2, -1), keepdim=True)
    masks = maps / highest.masked_fill(highest == 0, 1) > threshold
    return masks | masks[:1]


def blend(latents: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """`source + mask (latents - source)`, exact where the mask is 0 or 1."""
    mask = mask.to(latents)
    mixed = source + mask * (latents - source)
    return torch.where(mask == 1, latents, torch.where(mask == 0, source, mixed))


class Blend(Edit):
    """`z <- z_source + mask (z - z_source)` after each step; through `Control.callback`.

    Args:
        mask: `[height, width]` (or `[frames, height, width]`), or edits with `scores` (`WordMask`s), whose masks are
            joined.
        source, target: names of the branches.
        threshold, pool: of the maps of words, see `blend_masks`.
        minus: `WordMask`s whose masks are taken out again, without pooling.
        schedule: steps.
    """

    def __init__(
        self,
        mask: Any,
        *,
        source: str = "source",
        target: str = "target",
        threshold: float = 0.3,
        pool: int = 1,
        minus: Sequence[Any] = (),
        schedule: Schedule | None = None,
    ):
        self.mask, self.source, self.target, self.minus = mask, source, target, tuple(minus)
        self.threshold, self.pool, self.schedule = threshold, pool, schedule or Schedule()
        self.branches = (source, target)

    def sites(self, sites):
        return []

    def _mask(self, size: Sequence[int]) -> Tensor:
        if isinstance(self.mask, Tensor):
            return to_grid(self.mask, size).unflatten(-1, tuple(size))
        observers = self.mask if isinstance(self.mask, Sequence) else [self.mask]
        masks = [self._of(observer, size, self.threshold, self.pool) for observer in observers]
        taken = [self._of(observer, size, self.threshold, 0) for observer in self.minus]
        mask = torch.stack(masks).any(0)
        return (mask & ~torch.stack(taken).any(0) if taken else mask).float()

    def _of(self, observer: Any, size: Sequence[int], threshold: float, pool: int) -> Tensor:
        if getattr(observer, "smooth", None) is not None:
            return to_grid(observer.value, size).unflatten(-1, tuple(size)) > 0
        maps = observer.maps.sum(1)
        frames = maps.dim() == 4
        flat = maps.flatten(0, 1) if frames else maps
        masks = blend_masks(flat, size[-2:], threshold=threshold, pool=pool)
        return masks.unflatten(0, maps.shape[:2]).any(0) if frames else masks.any(0)

    def latents(self, step: int, total: int | None, latents: Tensor, control: Any) -> Tensor:
        if not self.schedule.active(Moment(step, total)):
            return latents
        if latents.dim() < 4:
            latents_grid = unpacked_grid(latents, control)
        else:
            latents_grid = tuple(latents.shape[-2:] if latents.dim() == 4 else latents.shape[-3:])
        mask = self._mask(latents_grid).to(latents.device)
        mask = mask.flatten()[:, None] if latents.dim() == 3 else mask
        rows = Rows(latents.shape[0], control.branches)
        mine, theirs = (list(rows.of(name)) for name in (self.target, self.source))
        latents = latents.clone()
        latents[mine] = blend(latents[mine], latents[theirs], mask)
        return latents


def unpacked_grid(latents: Tensor, control: Any) -> tuple[int, ...]:
    """Grid of packed latents `[B, tokens, channels]`: that of the last forward.

    Raises:
        ValueError: a grid that nobody saw, or of other tokens.
    """
    grid = control.grid
    if grid is None or torch.Size(grid).numel() != latents.shape[1]:
        raise ValueError(f"packed latents of {latents.shape[1]} tokens do not lie on the grid {grid} of the model")
    return tuple(grid)
