"""Attention and kernels by regions of an image: any labels of places, no matrix of all pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def region_attention(query: Tensor, key: Tensor, value: Tensor, regions: Tensor, *, scale: float) -> Tensor:
    """Attention of each token to those of its region.

    Tokens of a region are gathered, so the cost is the sum of the squares of the regions. How many tokens a region has
    is read from the device.

    Args:
        query, key, value: `[B, heads, N, d]`.
        regions: label of each token, integers `[B, N]`; which number a region has does not matter.
        scale: factor on query . key.

    Returns:
        `[B, heads, N, d]`.

    Raises:
        ValueError: labels of another shape.
    """
    if regions.shape != (query.shape[0], query.shape[2]):
        raise ValueError(f"regions.shape={tuple(regions.shape)} must be {(query.shape[0], query.shape[2])}")
    images = []
    for q, k, v, labels in zip(query, key, value, regions, strict=True):
        order = labels.argsort(stable=True)
        _, sizes = labels[order].unique_consecutive(return_counts=True)
        parts = [
            F.scaled_dot_product_attention(q[None, :, i], k[None, :, i], v[None, :, i], scale=scale)[0]
            for i in order.split(sizes.tolist())
        ]
        images.append(torch.zeros_like(torch.cat(parts, dim=1)).index_copy(1, order, torch.cat(parts, dim=1)))
    return torch.stack(images)


def region_means(x: Tensor, regions: Tensor, *, eps: float = 5e-4) -> Tensor:
    """Mean of each place's region, with the area enlarged by `eps`.

    Args:
        x: `[B, C, H, W]`.
        regions: labels `[B, H, W]`, integers of any value.

    Returns:
        `[B, C, H, W]`.
    """
    found = []
    for image, labels in zip(x.flatten(2), regions.flatten(1), strict=True):
        _, number, sizes = labels.unique(return_inverse=True, return_counts=True)
        sums = image.new_zeros(image.shape[0], len(sizes)).index_add(1, number, image)
        found.append((sums / (sizes + eps))[:, number])
    return torch.stack(found).view_as(x)


class RegionTransform(nn.Module):
    """Filters each place by kernels made from its features and the mean of its region (SegPIC, arXiv:2403.00628).

    Without regions, as at inference, the means are those of a coarse grid of cells. Parameters are named as in the
    official code.

    Args:
        channels: of the map.
        kernel: side of the kernels, odd.
        grid: cells a side without regions.
    """

    def __init__(self, channels: int, *, kernel: int = 3, grid: int = 4, device=None, dtype=None):
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel={kernel} must be odd")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.kernel, self.grid = kernel, grid
        point = lambda a, b: nn.Conv2d(a, b, 1, **dd)  # noqa: E731
        self.conv = nn.Sequential(point(channels, channels), nn.LeakyReLU(0.1), point(channels, channels))
        self.k_sp_gen = nn.Sequential(
            point(2 * channels, channels),
            nn.LeakyReLU(0.1),
            nn.Conv2d(channels, channels, 3, padding=1, **dd),
            nn.LeakyReLU(0.1),
            nn.Conv2d(channels, channels * kernel**2, 3, padding=1, groups=channels, **dd),
        )
        self.k_ch_gen = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            point(channels, channels),
            nn.LeakyReLU(0.1),
            point(channels, channels),
            nn.Sigmoid(),
        )
        self.conv_out = point(channels, channels)

    def centers(self, x: Tensor, regions: Tensor | None = None) -> Tensor:
        """The mean that belongs to each place, `[B, C, H, W]`."""
        if regions is not None:
            return region_means(x, regions)
        return F.interpolate(F.adaptive_avg_pool2d(x, self.grid), size=x.shape[2:], mode="nearest")

    def forward(self, x: Tensor, regions: Tensor | None = None, *, centers: Tensor | None = None) -> Tensor:
        """Transform.

        Args:
            x: `[B, C, H, W]`.
            regions: labels `[B, H, W]`; a grid of cells when None.
            centers: means that were sent instead of computed, `[B, C, H, W]`.
        """
        f = self.conv(x)
        centers = self.centers(x, regions) if centers is None else centers
        kernels = self.k_sp_gen(torch.cat([f, centers], dim=1)).unflatten(1, (-1, self.kernel**2))
        y = apply_kernels(f, kernels)
        return x + self.conv_out(y * self.k_ch_gen(y))


def apply_kernels(x: Tensor, kernels: Tensor) -> Tensor:
    """Filter `[B, C, H, W]` by a kernel per channel and place, `[B, C, side * side, H, W]`, zeros around the map."""
    side = round(kernels.shape[2] ** 0.5)
    around = F.unfold(x, side, padding=side // 2).view_as(kernels)
    return (around * kernels).sum(2)


class GDN(nn.Module):
    """Generalized divisive normalization, x / sqrt(beta + gamma x^2) (arXiv:1511.06281).

    Parameters are roots, so that what they stand for stays positive; named as in CompressAI.

    Args:
        channels: of the map.
    """

    PEDESTAL = 2.0**-36

    def __init__(self, channels: int, *, beta_min: float = 1e-6, init: float = 0.1, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lowest = (beta_min + self.PEDESTAL) ** 0.5
        self.beta = nn.Parameter((torch.ones(channels, **dd) + self.PEDESTAL).sqrt())
        self.gamma = nn.Parameter((init * torch.eye(channels, **dd) + self.PEDESTAL).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        beta = self.beta.clamp_min(self.lowest) ** 2 - self.PEDESTAL
        gamma = self.gamma.clamp_min(self.PEDESTAL**0.5) ** 2 - self.PEDESTAL
        return x * F.conv2d(x**2, gamma[..., None, None], beta).rsqrt()


def _modulation(channels: int, dd: dict[str, Any]) -> nn.Sequential:
    """A scale and a shift per place and channel."""
    return nn.Sequential(nn.Conv2d(channels, channels, 1, **dd), nn.GELU(), nn.Conv2d(channels, 2 * channels, 1, **dd))


def _modulated(x: Tensor, network: nn.Module) -> Tensor:
    scale, shift = network(x).chunk(2, dim=1)
    return x * (1 + scale) + shift


class ScaledDown(nn.Module):
    """Convolution to half of the resolution, GDN, then a scale and a shift per place that it makes itself (SegPIC).

    Args:
        in_channels, out_channels: of the maps.
        kernel: side of the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int = 5, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride=2, padding=kernel // 2, **dd)
        self.conv_groups = nn.Sequential(conv, GDN(out_channels, **dd))
        self.scales_bias = _modulation(out_channels, dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, H, W]` to `[B, out_channels, H / 2, W / 2]`."""
        return _modulated(self.conv_groups(x), self.scales_bias)


class ScaledUp(nn.Module):
    """The mirror of `ScaledDown`: a scale and a shift per place, a transposed convolution to twice the resolution, GDN.

    GDN is not inverted, as in the official decoder.

    Args:
        in_channels, out_channels: of the maps.
        kernel: side of the convolution, odd.
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int = 5, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        options: dict[str, Any] = {"stride": 2, "padding": kernel // 2, "output_padding": 1} | dd
        conv = nn.ConvTranspose2d(in_channels, out_channels, kernel, **options)
        self.conv_groups = nn.Sequential(conv, GDN(out_channels, **dd))
        self.scales_bias = _modulation(in_channels, dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, H, W]` to `[B, out_channels, 2 H, 2 W]`."""
        return self.conv_groups(_modulated(x, self.scales_bias))
