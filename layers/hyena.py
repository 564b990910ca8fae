"""Hyena: gates between convolutions whose long filters a small network makes (arXiv:2302.10866, arXiv:2402.13208)."""

import math
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.ops import long_convolution


class SineFilter(nn.Module):
    """A filter for any distance: sines of a small network of the distance, under a window that decays per channel.

    Args:
        channels: of the filter.
        features: numbers that a distance is given as: itself, and sines and cosines of it; odd, at least 3. The
            official default of 3 has one wave that hardly turns, so that nothing but the distance itself enters.
        hidden: width of the network.
        fast, slow: shares of the sequence after which the fastest and the slowest channel have decayed to a hundredth.
    """

    def __init__(
        self, channels: int, *, features: int = 5, hidden: int = 64, fast: float = 0.3, slow: float = 1.5, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__()
        if features < 3 or features % 2 == 0:
            raise ValueError(f"features={features} must be odd and at least 3")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels, self.features, self.fast, self.slow = channels, features, fast, slow
        sizes = (features, hidden, hidden, hidden)
        self.layers = nn.ModuleList(nn.Linear(a, b, **dd) for a, b in pairwise(sizes))
        self.frequency = nn.Parameter(torch.empty(hidden, **dd))
        self.last = nn.Linear(hidden, channels, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the frequencies of sines to 1; submodules have their own `reset_parameters`."""
        nn.init.ones_(self.frequency)

    def forward(self, length: int) -> Tensor:
        """Filter `[length, channels]` for distances of 0 to 1."""
        like = self.frequency
        distance = torch.linspace(0, 1, length, device=like.device, dtype=like.dtype)[:, None]
        waves = torch.arange(1, self.features // 2 + 1, device=like.device, dtype=like.dtype)
        angles = 2 * math.pi * distance * waves
        x = torch.cat([distance, angles.cos(), angles.sin()], -1)
        for layer in self.layers:
            x = (self.frequency * layer(x)).sin()
        rates = torch.linspace(math.log(100) / self.slow, math.log(100) / self.fast, self.channels, device=like.device)
        return self.last(x) * (-distance * rates.to(like.dtype)).exp()


class HyenaConvolution(nn.Module):
    """Two gates around a long convolution of `[B, N, dim]`, the order-2 Hyena of ConfHyena (arXiv:2402.13208).

    Both directions have a filter, of every distance in the sequence; the published form centres one filter of the
    length of the sequence, so that half of the distances are out of its reach. `short` is the depthwise
    convolution before the gates.

    Args:
        dim: channels of the input and the output.
        short: tokens of the short convolution, odd.
        filter_options: further arguments of `SineFilter`.

    Raises:
        ValueError: an even `short`; `forward` gets another shape.
    """

    def __init__(self, dim: int, *, short: int = 3, device=None, dtype=None, **filter_options: Any):
        super().__init__()
        if short % 2 == 0:
            raise ValueError(f"short={short} must be odd: the convolution is centred")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim = dim
        self.in_proj = nn.Linear(dim, 3 * dim, **dd)
        self.short = nn.Conv1d(3 * dim, 3 * dim, short, padding=short // 2, groups=3 * dim, **dd)
        self.filter = SineFilter(2 * dim, **filter_options, **dd)
        self.skip = nn.Parameter(torch.empty(dim, **dd))
        self.out_proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.skip)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, dim]` to `[B, N, dim]`."""
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, N, {self.dim}]")
        tokens = x.shape[1]
        outer, inner, value = self.short(self.in_proj(x).transpose(1, 2)).transpose(1, 2).chunk(3, dim=-1)
        forward, backward = (self.filter(tokens) / tokens**0.5).chunk(2, dim=1)
        both = F.pad(forward, (0, 0, tokens - 1, 0)) + F.pad(backward[1:].flip(0), (0, 0, 0, tokens))
        mixed = long_convolution(value * inner, both, center=tokens - 1, skip=self.skip)
        return self.out_proj(mixed * outer)

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("TorchScript cannot compile HyenaConvolution; use torch.export or torch.compile")
