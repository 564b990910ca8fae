"""What networks from image to image share: a residual on the enlarged input, sizes, tiles and self-ensembles."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCALES = (1, 2, 3, 4)


class Restorer(nn.Module):
    """Adds `residual(x)` to its input, enlarged bilinearly where `scale` is above 1.

    Inputs are padded by reflection to a multiple of `multiple` and results are cropped.

    Args:
        scale: of the result.

    Raises:
        ValueError: an unknown scale.
    """

    multiple: ClassVar[int] = 1
    least: ClassVar[int] = 1  # pixels a side

    def __init__(self, *, scale: int = 1):
        super().__init__()
        if scale not in SCALES:
            raise ValueError(f"scale={scale} must be one of {SCALES}")
        self.scale = scale

    def residual(self, x: Tensor, **options: Tensor) -> Tensor:
        """Addition to the enlarged input, `[B, C, scale * H, scale * W]`."""
        raise NotImplementedError

    def forward(self, x: Tensor, **options: Tensor) -> Tensor:
        """`[B, C, H, W]` in [0, 1] to `[B, C, scale * H, scale * W]`; options are masks, padded like the image.

        Raises:
            ValueError: a smaller image than the network takes.
        """
        if x.dim() != 4 or min(x.shape[2:]) < self.least:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected [B, C, H, W] of {self.least} pixels a side or more"
            )
        height, width = x.shape[2:]
        missing = (0, -width % self.multiple, 0, -height % self.multiple)
        padded = F.pad(x, missing, mode="reflect") if any(missing) else x
        if any(missing):
            options = {name: _pad_like(mask, missing) for name, mask in options.items()}
        base = padded if self.scale == 1 else F.interpolate(padded, scale_factor=self.scale, mode="bilinear")
        out = base + self.residual(padded, **options)
        return out[..., : self.scale * height, : self.scale * width]


def _pad_like(mask: Tensor, missing: tuple[int, ...]) -> Tensor:
    """A map of labels or a mask `[B, (1,) H, W]`, padded as its image."""
    kind, wide = mask.dtype, mask if mask.dim() == 4 else mask[:, None]
    padded = F.pad(wide.double(), missing, mode="reflect").to(kind)
    return padded if mask.dim() == 4 else padded[:, 0]


@torch.no_grad()
def restore_in_tiles(model: Restorer, x: Tensor, *, tile: int, overlap: int = 16) -> Tensor:
    """Restore an image of any size by tiles, whose overlaps are blended linearly.

    Args:
        model: takes `[B, C, tile, tile]`.
        x: `[B, C, H, W]`.
        tile: pixels a side; sides shorter than that are one tile.
        overlap: pixels that neighbouring tiles share, less than half of a tile.

    Raises:
        ValueError: an overlap out of range.
    """
    if not 0 <= overlap < tile / 2:
        raise ValueError(f"overlap={overlap} must lie in [0, tile / 2 = {tile / 2})")
    scale, (height, width) = model.scale, x.shape[2:]
    out = x.new_zeros(*x.shape[:2], height * scale, width * scale)
    weight = x.new_zeros(1, 1, *out.shape[2:])
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            part = model(x[..., top : top + tile, left : left + tile])
            ramp = _ramp(part.shape[2], overlap * scale, x)[:, None] * _ramp(part.shape[3], overlap * scale, x)
            rows = slice(top * scale, top * scale + part.shape[2])
            columns = slice(left * scale, left * scale + part.shape[3])
            out[..., rows, columns] += part * ramp
            weight[..., rows, columns] += ramp
    return out / weight


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def _ramp(length: int, overlap: int, like: Tensor) -> Tensor:
    """Weights of a tile along an axis: rising over the overlap, never zero."""
    at = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(at, at.flip(0)).clamp(max=overlap + 1) / (overlap + 1)


@torch.no_grad()
def self_ensemble(model: nn.Module, x: Tensor) -> Tensor:
    """Mean over the eight flips and quarter turns of an image `[B, C, H, W]`, turned back."""
    results = []
    for turns in range(4):
        for flip in (False, True):
            y = x.rot90(turns, (2, 3))
            y = model(y.flip(3) if flip else y)
            results.append((y.flip(3) if flip else y).rot90(-turns, (2, 3)))
    return torch.stack(results).mean(0)
