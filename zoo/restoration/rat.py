"""Restoration with attention inside of regions of any shape (RAT, arXiv:2407.09268); names as in the official code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.regions import region_attention
from .base import Restorer


class NAFBlock(nn.Module):
    """Two residual branches with products of halves instead of activations (arXiv:2204.04676, figure 3)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1, self.conv4 = (nn.Conv2d(dim, 2 * dim, 1) for _ in range(2))
        self.conv2 = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim)
        self.conv3, self.conv5 = (nn.Conv2d(dim, dim, 1) for _ in range(2))
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, dim, 1))
        self.norm1, self.norm2 = (LayerNorm2d(dim, eps=1e-6) for _ in range(2))
        self.beta, self.gamma = (nn.Parameter(torch.zeros(1, dim, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv2(self.conv1(self.norm1(x))).chunk(2, dim=1)
        y = a * b
        x = x + self.conv3(y * self.sca(y)) * self.beta
        a, b = self.conv4(self.norm2(x)).chunk(2, dim=1)
        return x + self.conv5(a * b) * self.gamma


class _Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(2 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class RegionAttention(nn.Module):
    """Attention of places to those of their region; logits are scaled by the number of heads, as published."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.project_out = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, regions: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(-1, -2).unbind(1)
        out = region_attention(q, k, v, regions.flatten(1), scale=self.heads**-0.5)
        return self.project_out(out.transpose(-1, -2).flatten(1, 2).view_as(x))


class WindowAttention(nn.Module):
    """Attention in windows that do not overlap, scaled likewise."""

    def __init__(self, dim: int, heads: int, window: int = 4):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv, self.proj_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        n = self.window
        parts = x.view(batch, dim, height // n, n, width // n, n).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)
        q, k, v = self.qkv(parts).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.heads**-0.5).transpose(1, 2).flatten(2)
        out = self.proj_out(out).view(batch, height // n, width // n, n, n, dim)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


class RegionLayer(nn.Module):
    """Attention in regions and in windows, each followed by a small network; both attentions start at weight 0."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        for name, attention in (("ra", RegionAttention(dim, heads)), ("wa", WindowAttention(dim, heads))):
            setattr(self, name, attention)
            setattr(self, f"lambda_{name}", nn.Parameter(torch.zeros(1, dim, 1, 1)))
            setattr(self, f"norm_{name}", LayerNorm2d(dim, eps=1e-6))
            setattr(self, f"norm_{name}_mlp", LayerNorm2d(dim, eps=1e-6))
            setattr(self, f"mlp_{name}", _Mlp(dim))

    def forward(self, x: Tensor, regions: Tensor) -> Tensor:
        x = x + self.lambda_ra * self.ra(self.norm_ra(x), regions)
        x = x + self.mlp_ra(self.norm_ra_mlp(x))
        x = x + self.lambda_wa * self.wa(self.norm_wa(x))
        return x + self.mlp_wa(self.norm_wa_mlp(x))


class RegionBlock(nn.Module):
    """Layers and a convolution, with a residual around them."""

    def __init__(self, dim: int, heads: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(RegionLayer(dim, heads) for _ in range(layers))
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, regions: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y, regions)
        return x + self.conv(y)


class RegionAttentionTransformer(Restorer):
    """A U-shaped network whose middle attends inside of regions, for images `[B, in_chans, H, W]`.

    Args:
        in_chans, width: channels of the image and of the first stage.
        encoder, decoder: blocks of each stage; two stages halve the sides.
        middle: region layers, a multiple of 3.
        heads: of the attentions.

    Raises:
        ValueError: stages that do not match, or a middle that is no multiple of 3.
    """

    multiple = 16

    def __init__(
        self,
        *,
        in_chans: int = 3,
        width: int = 64,
        encoder: Sequence[int] = (2, 2),
        middle: int = 12,
        decoder: Sequence[int] = (2, 2),
        heads: int = 8,
    ):
        super().__init__()
        if len(encoder) != len(decoder) or middle % 3:
            raise ValueError(
                f"encoder={encoder} and decoder={decoder} must be as long, middle={middle} a multiple of 3"
            )
        self.intro = nn.Conv2d(in_chans, width, 3, padding=1)
        self.ending = nn.Conv2d(width, in_chans, 3, padding=1)
        self.encoders, self.downs, self.ups, self.decoders = (nn.ModuleList() for _ in range(4))
        dim = width
        for depth in encoder:
            self.encoders.append(nn.Sequential(*(NAFBlock(dim) for _ in range(depth))))
            self.downs.append(nn.Conv2d(dim, 2 * dim, 2, stride=2))
            dim *= 2
        self.middle_blks = nn.ModuleList(RegionBlock(dim, heads, 3) for _ in range(middle // 3))
        for depth in decoder:
            self.ups.append(nn.Sequential(nn.Conv2d(dim, 2 * dim, 1, bias=False), nn.PixelShuffle(2)))
            dim //= 2
            self.decoders.append(nn.Sequential(*(NAFBlock(dim) for _ in range(depth))))

    def residual(self, x: Tensor, regions: Tensor | None = None) -> Tensor:
        """The change of images, by regions `[B, H, W]`, integers; one region where there are none."""
        if regions is None:
            regions = torch.zeros_like(x[:, 0], dtype=torch.long)
        x, skips = self.intro(x), []
        for stage, down in zip(self.encoders, self.downs, strict=True):
            x = stage(x)
            skips.append(x)
            x = down(x)
        step = 2 ** len(self.downs)
        y, labels = x, regions[:, ::step, ::step]  # the nearest label
        for block in self.middle_blks:
            y = block(y, labels)
        x = x + y
        for stage, up, skip in zip(self.decoders, self.ups, reversed(skips), strict=True):
            x = stage(up(x) + skip)
        return self.ending(x)
