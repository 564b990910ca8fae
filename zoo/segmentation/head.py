"""UPerNet's head (arXiv:1807.10221, §3): pyramid pooling, then a pyramid from coarse to fine.

Its norms are group norms, which do not depend on the batch, in place of synchronised batch norms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 8


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class ConvNormAct(nn.Sequential):
    """Convolution that keeps the size, group norm, ReLU.

    Args:
        dim, out: channels in and out; out is a multiple of 8.
        kernel: odd.
    """

    def __init__(self, dim: int, out: int, kernel: int):
        super().__init__(
            nn.Conv2d(dim, out, kernel, padding=kernel // 2, bias=False), nn.GroupNorm(GROUPS, out), nn.ReLU()
        )


class PyramidPooling(nn.Module):
    """Means of a map over grids of several sizes, beside the map (PSPNet, arXiv:1612.01105, §3.2).

    Args:
        dim, out: channels in and out.
        sizes: cells a side of the grids.
    """

    def __init__(self, dim: int, out: int, sizes: Sequence[int] = (1, 2, 3, 6)):
        super().__init__()
        self.sizes = tuple(sizes)
        self.project = nn.ModuleList(ConvNormAct(dim, out, 1) for _ in self.sizes)
        self.join = ConvNormAct(dim + len(self.sizes) * out, out, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, dim, H, W]` → `[B, out, H, W]`."""
        pooled = [
            _resize(project(F.adaptive_avg_pool2d(x, size)), x.shape[2:])
            for size, project in zip(self.sizes, self.project, strict=True)
        ]
        return self.join(torch.cat([x, *pooled], dim=1))


class PyramidHead(nn.Module):
    """Class logits at the size of the finest map.

    Args:
        channels: of the maps, finest first.
        num_classes: of the logits.
        width: channels inside, a multiple of 8 from 16 on: group norms of a mean over the map need two channels.
        dropout: of whole channels before the classifier.

    Raises:
        ValueError: no maps, or a width that group norms cannot divide.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, *, width: int = 256, dropout: float = 0.1):
        super().__init__()
        if not channels:
            raise ValueError(f"channels={list(channels)} must have at least one map")
        if width < 2 * GROUPS or width % GROUPS:
            raise ValueError(f"width={width} must be a multiple of {GROUPS}, at least {2 * GROUPS}")
        *finer, last = channels
        self.pool = PyramidPooling(last, width)
        self.lateral = nn.ModuleList(ConvNormAct(dim, width, 1) for dim in finer)
        self.smooth = nn.ModuleList(ConvNormAct(width, width, 3) for _ in finer)
        self.join = ConvNormAct(len(channels) * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps `[B, C, H, W]`, finest first → logits `[B, num_classes, H, W]` at the size of the first."""
        *finer, last = maps
        pyramid = [self.pool(last)]
        for lateral, x in zip(reversed(self.lateral), reversed(finer), strict=True):
            pyramid.append(lateral(x) + _resize(pyramid[-1], x.shape[2:]))
        size = maps[0].shape[2:]
        smoothed = [pyramid[0], *(smooth(x) for smooth, x in zip(reversed(self.smooth), pyramid[1:], strict=True))]
        joined = self.join(torch.cat([_resize(x, size) for x in smoothed], dim=1))
        return self.classifier(self.dropout(joined))
