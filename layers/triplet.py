"""Triplet attention: three gates, each of a plane of a map's axes (arXiv:2010.03045)."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn


class PlaneGate(nn.Module):
    """Gate of a plane from the largest and the mean value behind each of its points: `[B, 2, *plane]` to the same."""

    def __init__(self, kernel_size: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False, **dd)
        self.spatial = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(1, momentum=0.01, **dd)))

    def forward(self, x: Tensor, axis: int) -> Tensor:
        """The gate of `x` with one axis pooled away, `[B, *plane]`."""
        return self.spatial(torch.stack([x.amax(axis), x.mean(axis)], dim=1))[:, 0].sigmoid()


class TripletAttention2d(nn.Module):
    """Scales `[B, H, W, dim]` by the mean of three gates, each of a plane of two axes (arXiv:2010.03045, section 3.2).

    A gate pools the third axis by maximum and mean, and convolves the two maps of the plane into one. It has no
    parameters that depend on a size. Parameters are named as in the official checkpoints: `ChannelGateH` (plane of
    channels and columns), `ChannelGateW` (rows and channels) and `SpatialGate`.

    Args:
        kernel_size: side of the convolutions, odd.
        proj_drop: dropout of the result.

    Raises:
        ValueError: an even kernel_size; `forward` gets another number of axes.
    """

    def __init__(
        self,
        *,
        kernel_size: int = 7,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd: gates keep the size of their plane")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.ChannelGateH = PlaneGate(kernel_size, **dd)
        self.ChannelGateW = PlaneGate(kernel_size, **dd)
        self.SpatialGate = PlaneGate(kernel_size, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, dim]`."""
        if x.dim() != 4:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, H, W, dim]")
        by_column = self.ChannelGateH(x.transpose(2, 3), 1).transpose(1, 2)  # rows pooled: [B, W, dim]
        by_row = self.ChannelGateW(x, 2)  # columns pooled: [B, H, dim]
        by_place = self.SpatialGate(x, 3)  # channels pooled: [B, H, W]
        return self.proj_drop(x * (by_column[:, None] + by_row[:, :, None] + by_place[..., None]) / 3)
