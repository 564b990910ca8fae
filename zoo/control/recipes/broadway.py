"""BroadWay (ByTheWay): temporal attention with the energy that motion needs."""

import torch
from torch import Tensor

from ..registry import recipe

PRESETS = {"animatediff": (0.6, 1.5, 7), "videocrafter2": (0.1, 10.0, 7)}  # alpha, beta, tau


def energy(maps: Tensor) -> Tensor:
    """Mean over rows of the sum of squares of maps `[…, frames, frames]`."""
    return maps.square().sum(-1).mean()


def bands(maps: Tensor, tau: int) -> tuple[Tensor, Tensor]:
    """High and low band of maps along their keys: `[F/2 - tau, F/2 + tau]` of the centered spectrum, and the rest."""
    frames = maps.shape[-1]
    spectrum = torch.fft.fftshift(torch.fft.fft(maps, dim=-1), dim=-1)
    place = torch.arange(frames, device=maps.device)
    # distance to the highest frequency, which the plain order has in the middle
    index = torch.fft.fftshift(place)
    high = (index >= frames // 2 - tau) & (index <= frames // 2 + tau)
    return spectrum * high, spectrum * ~high


@recipe(
    "BroadWay / ByTheWay",
    "Bujiazi/ByTheWay@1ae7294",
    "exact",
    hosts="AnimateDiff, VideoCrafter2: temporal attention of up blocks, first 20 % of steps",
    needs="the map of the corresponding module of the first up block",
    cost="maps of frames x frames",
)
def broadway(maps: Tensor, first: Tensor, *, alpha: float = 0.6, beta: float = 1.5, tau: int = 7) -> Tensor:
    """Maps `[rows, frames, frames]` of temporal attention, enhanced.

    Args:
        maps: rows are [uncond | cond], pixels and heads.
        first: of the first up block's module, on the same rows.
        alpha: share of the way to it; 0 with beta 1 may still raise lost energy, and is neutral else.
        beta: least factor on the high band.
        tau: half width of the band.
    """
    cond = slice(len(maps) // 2, None)
    wanted = energy(maps[cond])
    maps = maps + alpha * (first - maps)
    high, low = bands(maps, tau)
    frames = maps.shape[-1]  # Parseval
    energies = [part[cond].abs().square().sum(-1).mean() / frames for part in (high, low)]
    factor = ((wanted - energies[1]).clamp(min=0) / energies[0]).sqrt().clamp(min=beta)
    spectrum = torch.fft.ifftshift(factor * high + low, dim=-1)
    enhanced = torch.fft.ifft(spectrum, dim=-1).real
    return enhanced / enhanced.sum(-1, keepdim=True)


def affine(out: Tensor, value: Tensor, beta: float | Tensor) -> Tensor:
    """The same where the band is all but the mean, as in both presets of 16 frames: `beta out + (1 - beta) mean value`.

    Args:
        out, value: `[B, frames, heads, d]`.
        beta: factor on the band.
    """
    return beta * out + (1 - beta) * value.mean(1, keepdim=True)
