"""Entropy models of learned compression: bits of rounded values under densities that training fits."""

from __future__ import annotations

import math
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST = 1e-9  # probability: a value that a model did not expect costs 30 bits
SMALLEST_SCALE = 0.11  # below, a rounded normal variable is constant


def round_through(x: Tensor) -> Tensor:
    """Rounded values with the gradient of the identity."""
    return x + (x.round() - x).detach()


def uniform_noise(x: Tensor) -> Tensor:
    """Values with noise between -1/2 and 1/2, whose density is that of rounding where the values vary widely."""
    return x + torch.rand_like(x) - 0.5


def normal_bits(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Bits of each value: minus log2 of the mass of the unit interval around it under a normal density.

    Args:
        x: values, whole numbers away from the mean or noisy ones.
        mean, scale: of each value; scales below 0.11 count as that.
    """
    width, away = scale.clamp_min(SMALLEST_SCALE) * math.sqrt(2), (x - mean).abs()
    # complements of one tail keep their difference far from the mean
    mass = (torch.erfc((away - 0.5) / width) - torch.erfc((away + 0.5) / width)) / 2
    return -mass.clamp_min(LEAST).log2()


class FactorizedPrior(nn.Module):
    """A density per channel without a form of its own: its cumulative is a small monotone network (arXiv:1802.01436).

    Values are rounded to whole numbers, not around a median as in CompressAI, so no second optimizer is needed.

    Args:
        channels: of the values.
        hidden: widths of the network, above 1.
        spread: standard deviation, roughly, at the start.
    """

    def __init__(
        self, channels: int, *, hidden: tuple[int, ...] = (3, 3, 3), spread: float = 10.0, device=None, dtype=None
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = (1, *hidden, 1)
        step = spread ** (1 / (len(sizes) - 1))
        self.matrices, self.biases, self.factors = (nn.ParameterList() for _ in range(3))
        for narrow, wide in pairwise(sizes):
            start = math.log(math.expm1(1 / step / wide))  # softplus of it shares the slope among the outputs
            self.matrices.append(nn.Parameter(torch.full((channels, wide, narrow), start, **dd)))
            self.biases.append(nn.Parameter(torch.rand(channels, wide, 1, **dd) - 0.5))
            if wide != 1:
                self.factors.append(nn.Parameter(torch.zeros(channels, wide, 1, **dd)))

    def cumulative_logits(self, x: Tensor) -> Tensor:
        """Logits of the cumulative at `[channels, 1, N]`, which rise with x."""
        for matrix, bias, factor in zip_longest(self.matrices, self.biases, self.factors):
            x = F.softplus(matrix) @ x + bias
            x = x if factor is None else x + factor.tanh() * x.tanh()
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Bits of each value of `[B, channels, …]`, in the same shape."""
        values = x.transpose(0, 1).flatten(1)[:, None]
        below, above = self.cumulative_logits(values - 0.5), self.cumulative_logits(values + 0.5)
        side = -(below + above).sign().detach()  # of the tail in which differences of sigmoids are exact
        mass = ((side * above).sigmoid() - (side * below).sigmoid()).abs()
        bits = -mass.clamp_min(LEAST).log2()
        return bits.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)


class SlicedNormal(nn.Module):
    """Normal densities slice by slice of the channels, each told of earlier slices (arXiv:2007.08739).

    A slice is rounded around its predicted mean; what rounding lost is then predicted, too, within one half.

    Args:
        channels: of the values, a multiple of slices.
        slices: of the channels.
        support: first slices that later ones see.
        hidden: widths of the networks that predict, as parts of channels.

    Raises:
        ValueError: slices that do not divide the channels.
    """

    def __init__(self, channels: int, *, slices: int = 10, support: int = 5, hidden: tuple[float, float] = (0.7, 0.4)):
        super().__init__()
        if channels % slices:
            raise ValueError(f"slices={slices} must divide channels={channels}")
        self.support, width = support, channels // slices

        def network(inputs: int) -> nn.Sequential:
            sizes = (inputs, *(max(width, int(part * channels)) for part in hidden), width)
            convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes)]
            return nn.Sequential(convs[0], nn.GELU(), convs[1], nn.GELU(), convs[2])

        seen = [channels + width * min(i, support) for i in range(slices)]
        self.mean, self.scale = (nn.ModuleList(network(n) for n in seen) for _ in range(2))
        self.lost = nn.ModuleList(network(n + width) for n in seen)

    def forward(self, y: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Round values and count their bits; noise takes the place of rounding in the bits of training.

        Args:
            y: values `[B, channels, H, W]`.
            mean, scale: features for both, of the same shape.

        Returns:
            rounded: `[B, channels, H, W]`, with gradients as if they were not.
            bits: of each value.
        """
        found, bits = [], []
        for i, part in enumerate(y.chunk(len(self.mean), dim=1)):
            earlier = found[: self.support]
            center = self.mean[i](torch.cat([mean, *earlier], dim=1))
            width = F.softplus(self.scale[i](torch.cat([scale, *earlier], dim=1)))
            rounded = round_through(part - center) + center
            bits.append(normal_bits(uniform_noise(part) if self.training else rounded, center, width))
            lost = self.lost[i](torch.cat([mean, *earlier, rounded], dim=1))
            found.append(rounded + 0.5 * lost.tanh())
        return torch.cat(found, dim=1), torch.cat(bits, dim=1)
