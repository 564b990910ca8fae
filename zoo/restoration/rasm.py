"""Removal of shadows by dilated neighborhood attention (RASM, arXiv:2411.14201); names as in the official files."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...layers import NeighborhoodAttention2d
from .base import Restorer

STAGES = (  # name, channels as a multiple of embed_dim, heads of the attention (0: none)
    ("encoderlayer_0", 1, 0),
    ("encoderlayer_1", 2, 0),
    ("encoderlayer_2", 4, 4),
    ("conv", 8, 16),
    ("decoderlayer_0", 8, 8),
    ("decoderlayer_1", 4, 0),
    ("decoderlayer_2", 2, 0),
)


class ChannelAttention(nn.Module):
    """Scales channels by their means."""

    def __init__(self, dim: int, ratio: int = 4):
        super().__init__()
        self.conv_du = nn.Sequential(
            nn.Conv2d(dim, dim // ratio, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(dim // ratio, dim, 1, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_du(x.mean((2, 3), keepdim=True))


class ChannelBlock(nn.Module):
    """Two depthwise convolutions and channel attention, with a residual."""

    def __init__(self, dim: int):
        super().__init__()
        self.CA = ChannelAttention(dim)
        dw = lambda: nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)  # noqa: E731
        self.body = nn.Sequential(dw(), nn.PReLU(), dw())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.CA(self.body(x))


class LeFF(nn.Module):
    """Two layers with a depthwise convolution between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.linear1 = nn.Sequential(nn.Linear(dim, hidden), nn.GELU())
        self.dwconv = nn.Sequential(nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.GELU())
        self.linear2 = nn.Sequential(nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to the same shape."""
        y = self.dwconv(self.linear1(x).permute(0, 3, 1, 2))
        return self.linear2(y.permute(0, 2, 3, 1))


class ShadowBlock(nn.Module):
    """Neighborhood attention where there are heads, channel attention, and a local network, on `[B, H, W, dim]`."""

    def __init__(self, dim: int, heads: int, window: int, dilation: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim) for _ in range(2))
        self.attn = None
        if heads:
            options = {"window": window, "dilation": dilation, "rpb": True, "pad": True}
            self.attn = NeighborhoodAttention2d(dim, num_heads=heads, **options)
        self.mlp, self.CAB = LeFF(dim, 4 * dim), ChannelBlock(dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y = y if self.attn is None else self.attn(y)
        x = x + self.CAB(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(self.norm2(x))


class ShadowRemover(Restorer):
    """Removes shadows from images `[B, 3, H, W]`, given a mask of them.

    Args:
        embed_dim: channels of the first stage, a multiple of 4 whose eightfold 16 heads divide.
        depth: blocks of each stage.
        window, dilation: of the attention; maps of fewer places than both together are padded inside.
        in_chans: of the images.
    """

    multiple = 8

    def __init__(self, *, embed_dim: int = 32, depth: int = 2, window: int = 11, dilation: int = 2, in_chans: int = 3):
        super().__init__()
        self.input_proj, self.output_proj = nn.Module(), nn.Module()
        self.input_proj.proj = nn.Sequential(nn.Conv2d(in_chans + 1, embed_dim, 3, padding=1), nn.LeakyReLU(0.01))
        self.output_proj.proj = nn.Sequential(nn.Conv2d(2 * embed_dim, in_chans, 3, padding=1))
        for name, times, heads in STAGES:
            blocks = (ShadowBlock(times * embed_dim, heads, window, dilation) for _ in range(depth))
            stage = nn.Module()
            stage.blocks = nn.Sequential(*blocks)
            setattr(self, name, stage)
        for i, (below, above) in enumerate(((1, 2), (2, 4), (4, 8))):
            down = nn.Module()
            down.conv = nn.Sequential(nn.Conv2d(below * embed_dim, above * embed_dim, 4, stride=2, padding=1))
            setattr(self, f"dowsample_{i}", down)
        for i, (above, below) in enumerate(((8, 4), (8, 2), (4, 1))):
            up = nn.Module()
            up.deconv = nn.Sequential(nn.ConvTranspose2d(above * embed_dim, below * embed_dim, 2, stride=2))
            setattr(self, f"upsample_{i}", up)

    def residual(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The change of images, given a mask `[B, 1, H, W]` of shadows, 0 to 1; none when None."""
        mask = torch.zeros_like(x[:, :1]) if mask is None else mask.to(x)
        x = self.input_proj.proj(torch.cat([x, mask], dim=1)).permute(0, 2, 3, 1)  # pyright: ignore
        skips = []
        for i in range(3):
            x = getattr(self, f"encoderlayer_{i}").blocks(x)
            skips.append(x)
            x = self._resize(getattr(self, f"dowsample_{i}").conv, x)
        x = self.conv.blocks(x)  # pyright: ignore
        for i in range(3):
            x = torch.cat([self._resize(getattr(self, f"upsample_{i}").deconv, x), skips[2 - i]], dim=-1)
            x = getattr(self, f"decoderlayer_{i}").blocks(x)
        return self.output_proj.proj(x.permute(0, 3, 1, 2))  # pyright: ignore

    @staticmethod
    def _resize(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
