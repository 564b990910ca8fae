"""Learned compression with a transform that adapts to regions (SegPIC, arXiv:2403.00628).

The transforms are the published ones. Ours: the block around the window attention (arXiv:2203.08450), widths of the
networks that predict means and scales, and one stream of means, those of the encoder's regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.entropy import FactorizedPrior, SlicedNormal, round_through, uniform_noise
from ...layers.regions import GDN, RegionTransform, ScaledDown, ScaledUp
from ...layers.window import WindowAttention2d

MULTIPLE = 64  # pixels: four halvings of the transform, two of the hyperprior


class Compressed(NamedTuple):
    """Results of `RegionCodec`.

    Attributes:
        images: decoded `[B, C, H, W]`.
        bits: of each image `[B]`, by the entropy models; a range coder comes within a few bytes of them.
    """

    images: Tensor
    bits: Tensor


def residual_unit(width: int) -> nn.Module:
    """Three convolutions through half of the channels."""
    half = width // 2
    parts = (nn.Conv2d(width, half, 1), nn.Conv2d(half, half, 3, padding=1), nn.Conv2d(half, width, 1))
    return nn.Sequential(parts[0], nn.GELU(), parts[1], nn.GELU(), parts[2])


class WindowGate(nn.Module):
    """Residual units gated by window attention and residual units, beside a residual (arXiv:2203.08450)."""

    def __init__(self, width: int, *, num_heads: int, window: int):
        super().__init__()
        self.attn = WindowAttention2d(width, num_heads=num_heads, window=window, shift=window // 2)
        self.trunk, self.gate = (nn.ModuleList(residual_unit(width) for _ in range(3)) for _ in range(2))
        self.last = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, width, H, W]` to the same shape."""
        a, b = x, x + self.attn(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for trunk, gate in zip(self.trunk, self.gate, strict=True):
            a, b = F.gelu(a + trunk(a)), F.gelu(b + gate(b))
        return x + a * self.last(b).sigmoid()


class Means(nn.Module):
    """Means of regions, coded: three layers with GDN to the values that are sent, and three back."""

    def __init__(self, width: int, sent: int, *, gain: float):
        super().__init__()
        self.gain = gain
        between = (width + sent) // 2
        sizes = (width, between, sent, sent)

        def network(sizes: Sequence[int]) -> nn.Sequential:
            a, b, c, d = sizes
            return nn.Sequential(nn.Conv2d(a, b, 1), GDN(b), nn.Conv2d(b, c, 1), GDN(c), nn.Conv2d(c, d, 1))

        self.encode, self.decode, self.prior = network(sizes), network(sizes[::-1]), FactorizedPrior(sent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means `[B, width, rows, columns]` as a decoder gets them, and their bits."""
        sent = self.gain * self.encode(x)
        rounded = round_through(sent)
        return self.decode(rounded / self.gain), self.prior(uniform_noise(sent) if self.training else rounded)


def keep_variance(module: nn.Module) -> None:
    """Draw the weights of a change of resolution such that values stay as large as they are.

    PyTorch's own weights shrink them by half a layer, and eight layers in a row leave nothing to learn from.
    """
    if isinstance(module, ScaledDown | ScaledUp):
        conv: nn.Module = module.conv_groups[0]
        inputs = conv.in_channels * conv.kernel_size[0] ** 2  # pyright: ignore
        inputs = inputs / 4 if isinstance(module, ScaledUp) else inputs  # a place of the result sees a quarter
        nn.init.normal_(conv.weight, std=inputs**-0.5)  # pyright: ignore


def means_of(x: Tensor, labels: Tensor, *, eps: float = 5e-4) -> tuple[Tensor, Tensor]:
    """Mean of each region of one image.

    Args:
        x: `[C, H, W]`.
        labels: `[H, W]`, integers of any value.

    Returns:
        means `[1, C, regions, 1]`, and the number of the region of each place, `[H * W]`.
    """
    _, number, sizes = labels.flatten().unique(return_inverse=True, return_counts=True)
    sums = x.new_zeros(x.shape[0], len(sizes)).index_add(1, number, x.flatten(1))
    return (sums / (sizes + eps))[None, ..., None], number


class RegionCodec(nn.Module):
    """Encodes and decodes images `[B, in_chans, H, W]` in [0, 1], and says how many bits they take.

    Kernels of the region transform follow from means of regions, which the decoder is sent. Regions are known in
    training only; without them, as in use, they are the cells of a grid.

    Args:
        width, latent: channels of the transform and of what is coded.
        slices, support: see `SlicedNormal`.
        sent: channels of a mean that are coded.
        grid: cells a side without regions.
        num_heads: of the window attention, a divisor of width and latent.
        windows: its sides, at a quarter and at a sixteenth of the resolution.
        gain: factor of all that is rounded, which the decoder divides by; a short training needs more than 1, because
            rounding leaves nothing of values as small as those of fresh layers.
        in_chans: of the images.

    Raises:
        ValueError: numbers that do not divide the channels; in `forward`, images or regions of other shapes.
    """

    def __init__(
        self,
        *,
        width: int = 192,
        latent: int = 320,
        slices: int = 10,
        support: int = 5,
        sent: int = 96,
        grid: int = 4,
        num_heads: int = 8,
        windows: tuple[int, int] = (8, 4),
        gain: float = 1.0,
        in_chans: int = 3,
    ):
        super().__init__()
        self.in_chans, self.grid, self.gain = in_chans, grid, gain
        sizes = tuple(zip((width, latent), windows, strict=True))
        gates = [WindowGate(n, num_heads=num_heads, window=side) for n, side in (*sizes, *sizes)]
        self.down = nn.Sequential(ScaledDown(in_chans, width), ScaledDown(width, width))
        self.attn_down, self.transform_down = gates[0], RegionTransform(width, grid=grid)
        self.deeper = nn.Sequential(ScaledDown(width, width), ScaledDown(width, latent), gates[1])
        self.higher = nn.Sequential(gates[3], ScaledUp(latent, width), ScaledUp(width, width))
        self.transform_up, self.attn_up = RegionTransform(width, grid=grid), gates[2]
        last = max(8, width // 6)  # 32 of 192
        self.up = nn.Sequential(ScaledUp(width, width), ScaledUp(width, last), nn.Conv2d(last, in_chans, 1))
        self.means = Means(width, sent, gain=gain)

        a, b, c, d, e = (round(part * latent) for part in (1.0, 0.9, 0.8, 0.7, 0.6))
        conv = lambda n, m, stride=1: nn.Conv2d(n, m, 3, stride=stride, padding=1)  # noqa: E731
        twice = lambda n, m: nn.Sequential(conv(n, 4 * m), nn.PixelShuffle(2))  # noqa: E731
        self.hyper = _with_gelu(conv(a, a), conv(a, b), conv(b, c, 2), conv(c, d), conv(d, e, 2))
        self.mean, self.scale = (
            _with_gelu(conv(e, e), twice(e, d), conv(d, c), twice(c, b), conv(b, a)) for _ in range(2)
        )
        self.prior, self.coded = FactorizedPrior(e), SlicedNormal(latent, slices=slices, support=support)
        self.apply(keep_variance)

    def send_means(self, x: Tensor, regions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Means of regions as the decoder gets them, at each place of `[B, width, h, w]`, and their bits `[B]`."""
        if regions is None:
            found, bits = self.means(F.adaptive_avg_pool2d(x, self.grid))
            return F.interpolate(found, size=x.shape[2:], mode="nearest"), bits.flatten(1).sum(1)
        places, costs = [], []
        for image, labels in zip(x, regions, strict=True):
            means, number = means_of(image, labels)
            found, bits = self.means(means)
            places.append(found[0, :, :, 0][:, number].view_as(image))
            costs.append(bits.sum())
        return torch.stack(places), torch.stack(costs)

    def forward(self, images: Tensor, regions: Tensor | None = None) -> Compressed:
        """Encode and decode.

        Args:
            images: `[B, in_chans, H, W]`; padded to multiples of 64 by their last row and column, and cropped.
            regions: labels of the pixels, integers `[B, H, W]`; a grid of cells when None.
        """
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected [B, {self.in_chans}, H, W]")
        height, width = images.shape[2:]
        if regions is not None and regions.shape != (len(images), height, width):
            raise ValueError(f"regions have shape {tuple(regions.shape)}; expected {(len(images), height, width)}")
        missing = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
        x = self.down(F.pad(images, missing, mode="replicate"))
        if regions is not None:
            padded = F.pad(regions[:, None].double(), missing, mode="replicate")
            regions = F.interpolate(padded, size=x.shape[2:], mode="nearest")[:, 0].long()
        x = self.attn_down(x)
        means, bits = self.send_means(x, regions)
        y = self.deeper(self.transform_down(x, regions))
        z = self.gain * self.hyper(y)
        rounded = round_through(z)
        hyper_bits = self.prior(uniform_noise(z) if self.training else rounded)
        mean, scale = (self.gain * network(rounded / self.gain) for network in (self.mean, self.scale))
        found, value_bits = self.coded(self.gain * y, mean, scale)
        x = self.attn_up(self.transform_up(self.higher(found / self.gain), centers=means))
        decoded = self.up(x)[..., :height, :width]
        return Compressed(decoded, bits + hyper_bits.flatten(1).sum(1) + value_bits.flatten(1).sum(1))


def _with_gelu(*layers: nn.Module) -> nn.Sequential:
    """Layers with GELU between them."""
    return nn.Sequential(*(x for layer in layers[:-1] for x in (layer, nn.GELU())), layers[-1])
