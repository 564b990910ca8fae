"""Style transfer by attention to few keys (StyA2K, ICCV 2023): encoder, attention at three depths, decoder.

The encoder is that of VGG-19, as published, with weights of torchvision's layout or random ones. Ours: the channels of
the decoder's layers, and padding of other sizes than multiples of 64.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.style import AllToKeyAttention, from_regions, standardize, to_regions

LEVELS = (1, 1, 0, 2, 2, 0, 4, 4, 4, 4, 0, 8, 8, 8, 8, 0, 8)  # channels of VGG-19 over its first; 0: pooling
TAPS = (1, 6, 11, 20, 29)  # the first rectifier behind each pooling
REGIONS = (8, 8, 4)  # sides of the regions at the last three taps
MULTIPLE = 64


class StyleEncoder(nn.Module):
    """Features of VGG-19 at five depths; the keys of its weights are torchvision's and timm's.

    Random weights are orthogonal and follow from a seed: their statistics describe textures too, less well than
    those of weights that know objects.

    Args:
        width: channels of the first layers; 64 as published.
        in_chans: of the images.
        seed: of random weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, width: int = 64, in_chans: int = 3, seed: int = 0):
        super().__init__()
        layers, channels, generator = [], in_chans, torch.Generator().manual_seed(seed)
        for times in LEVELS:
            if times == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            conv = nn.Conv2d(channels, times * width, 3, padding=1, padding_mode="reflect")
            if not conv.weight.is_meta:
                nn.init.orthogonal_(conv.weight, gain=2**0.5, generator=generator)
                nn.init.zeros_(conv.bias)  # pyright: ignore
            layers += [conv, nn.ReLU()]
            channels = times * width
        self.features = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406][:in_chans]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225][:in_chans]).view(1, -1, 1, 1), persistent=False)
        self.requires_grad_(False)

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a VGG-19 from its state dict.

        Raises:
            ValueError: weights are missing or have other shapes.
        """
        own = self.state_dict()
        wrong = sorted(n for n, x in own.items() if n not in weights or weights[n].shape != x.shape)
        if wrong:
            raise ValueError(f"no weights of a VGG-19 of this width: {wrong[0]!r} is missing or of another shape")
        self.load_state_dict({n: weights[n] for n in own})

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of images in [0, 1], from `[B, width, H, W]` to `[B, 8 * width, H / 16, W / 16]`."""
        x, found = (images - self.mean) / self.std, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in TAPS:
                found.append(x)
        return found


class StyleTransfer(nn.Module):
    """Paints a content `[B, 3, H, W]` in the style of another image, both in [0, 1].

    Args:
        width: channels of the encoder's first features; 64 as published.
        num_heads: of the attention, a divisor of four times the width.
        in_chans: of the images.
        seed: of the encoder's random weights, which are not trained.

    Raises:
        ValueError: in `forward`, tensors that are not two batches of images.
    """

    def __init__(self, *, width: int = 64, num_heads: int = 8, in_chans: int = 3, seed: int = 0):
        super().__init__()
        self.encoder = StyleEncoder(width=width, in_chans=in_chans, seed=seed)
        attention = [
            AllToKeyAttention(times * width, num_heads=num_heads, region=side)
            for times, side in zip((4, 8, 8), REGIONS, strict=True)
        ]
        self.attention = nn.ModuleList(attention)

        def convs(*channels: int) -> nn.Sequential:
            pairs = pairwise(channels)
            made = (nn.Sequential(nn.Conv2d(a, b, 3, padding=1, padding_mode="reflect"), nn.ReLU()) for a, b in pairs)
            return nn.Sequential(*made)

        self.merge = nn.Conv2d(8 * width, 8 * width, 3, padding=1, padding_mode="reflect")
        wide, middle, narrow = 8 * width, 4 * width, 2 * width
        steps = (wide, middle), (wide, middle, middle, middle, narrow), (narrow, narrow, width), (width, width)
        self.steps = nn.ModuleList(convs(*channels) for channels in steps)
        self.last = nn.Conv2d(width, in_chans, 3, padding=1, padding_mode="reflect")

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        """`[B, C, H, W]` and a style `[B, C, h, w]`, which is resized to the content, to `[B, C, H, W]`."""
        if content.dim() != 4 or style.dim() != 4 or content.shape[:2] != style.shape[:2]:
            raise ValueError(
                f"content and style of {tuple(content.shape)} and {tuple(style.shape)} must be batches of images alike"
            )
        height, width = content.shape[2:]
        whole = F.pad(content, (0, -width % MULTIPLE, 0, -height % MULTIPLE), mode="replicate")
        if style.shape != whole.shape:
            style = F.interpolate(style, size=whole.shape[2:], mode="bilinear", antialias=True)
        return self.decode(self.encoder(whole), self.encoder(style))[..., :height, :width]

    def decode(self, content: list[Tensor], style: list[Tensor]) -> Tensor:
        """Images of features of content and style."""
        skip, deep, deepest = (
            attention(c, s) for attention, c, s in zip(self.attention, content[2:], style[2:], strict=True)
        )
        x = self.merge(deep + F.interpolate(deepest, scale_factor=2, mode="nearest"))
        for i, step in enumerate(self.steps):
            x = step(x)
            if i < 3:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            if i == 0:
                x = torch.cat([x, skip], dim=1)
        return self.last(x)


def plain_attention(content: Tensor, style: Tensor, *, num_heads: int = 8, region: int = 8) -> Tensor:
    """Features of the style for each place, by `AllToKeyAttention` without parameters: the mean of its two forms.

    Standardized features are queries and keys, the style's are values. The published target is the sum of both and of
    the content's features, three times as large as features of any image, which is at odds with the style's statistics.
    """
    given = standardize(content), standardize(style), style
    q, k, v = (to_regions(x, num_heads, region) for x in given)
    layer = AllToKeyAttention(num_heads, num_heads=num_heads, region=region, device=content.device).to(content.dtype)
    size = (content.shape[2], content.shape[3])
    both = [from_regions(attend(q, k, v), size) for attend in (layer.distributed, layer.progressive)]
    return torch.stack(both).mean(0)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel of `[B, C, H, W]`."""
    return x.mean((2, 3)), (x.var((2, 3)) + 1e-5).sqrt()


def style_distance(found: list[Tensor], style: list[Tensor]) -> Tensor:
    """Squared differences of means and deviations at the first four depths, summed."""
    pairs = [(moments(a), moments(b)) for a, b in zip(found[:4], style[:4], strict=True)]
    return torch.stack([F.mse_loss(torch.stack(a), torch.stack(b)) for a, b in pairs]).sum() * 2


def content_distance(found: list[Tensor], content: list[Tensor]) -> Tensor:
    """Squared differences of standardized features at the fourth and fifth depth, summed."""
    pairs = zip(found[3:], content[3:], strict=True)
    return torch.stack([F.mse_loss(standardize(a), standardize(b)) for a, b in pairs]).sum()


def local_distance(found: list[Tensor], content: list[Tensor], style: list[Tensor], *, num_heads: int = 8) -> Tensor:
    """Squared differences to attention without parameters at the last four depths, summed."""
    sides = (8, *REGIONS)
    levels = zip(found[1:], content[1:], style[1:], sides, strict=True)
    return torch.stack(
        [F.mse_loss(a, plain_attention(c, s, num_heads=num_heads, region=side)) for a, c, s, side in levels]
    ).sum()
