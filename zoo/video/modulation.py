"""Modulation of blocks by the timestep: adaLN-single, or a LayerNorm whose affine follows the time (TD-LN).

The timestep of a video is one number, one per frame or one per token. Tokens are in raster order, time slowest, so all
three are `M` groups of consecutive tokens with M = 1, T or S, and modulation works on `[B, M, S / M, dim]`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and modulation: float32, or float64 in float64 models."""
    return torch.promote_types(dtype, torch.float32)


class Modulation(NamedTuple):
    """Shift, scale and gate of one half of a block (attention or MLP), each `[B, M, 1, dim]`.

    Attributes:
        shift, scale: `norm(x) * (1 + scale) + shift` goes in.
        gate: factor on what comes out; none when None.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor | None

    def modulate(self, x: Tensor, eps: float) -> Tensor:
        """LayerNorm of `[B, S, dim]`, without an affine of its own, and the modulation; in the dtype of x."""
        normed = F.layer_norm(x.to(wide(x.dtype)), x.shape[-1:], eps=eps)
        groups = normed.unflatten(1, (self.shift.shape[1], -1))
        return (groups * (1 + self.scale) + self.shift).flatten(1, 2).to(x.dtype)

    def residual(self, x: Tensor, update: Tensor) -> Tensor:
        """`x + gate * update`, in the dtype of x."""
        if self.gate is None:
            return x + update
        groups = update.to(wide(x.dtype)).unflatten(1, (self.gate.shape[1], -1))
        return (x + (groups * self.gate).flatten(1, 2)).to(x.dtype)


class AdaLNSingle(nn.Module):
    """One projection of the timestep for all blocks and a table of offsets in each (PixArt-alpha, arXiv:2310.00426)."""

    def __init__(self, dim: int, parts: int = 2):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(3 * parts, dim))

    def forward(self, conditioning: Tensor) -> tuple[Modulation, ...]:
        """Modulation of attention and of MLP, or of the first alone, from the shared projection `[B, M, 6, dim]`."""
        values = self.scale_shift_table + conditioning[:, :, : len(self.scale_shift_table)]  # [B, M, 3 * parts, dim]
        return tuple(Modulation(*part.unbind(2)) for part in values.unsqueeze(3).split(3, dim=2))


class TimeDependentLayerNorm(nn.Module):
    """LayerNorm affine between two learned ends: s(t) p1 + (1 - s(t)) p2 with s(t) = sigmoid(w t + b) (DiMR,
    arXiv:2406.09416, TD-LN). A block has two of them and no gates: 8 dim + 4 numbers instead of a shared projection.

    w = 4 and b = -2 to begin with: the first end belongs to noise, the second to data, and they learn apart.
    """

    def __init__(self, dim: int, parts: int = 2):
        super().__init__()
        self.ends = nn.Parameter(torch.zeros(parts, 2, 2, dim))  # [attention or MLP, end, shift or scale - 1, dim]
        self.slope = nn.Parameter(torch.full((parts,), 4.0))
        self.offset = nn.Parameter(torch.full((parts,), -2.0))

    def forward(self, conditioning: Tensor) -> tuple[Modulation, ...]:
        """Modulation of attention and of MLP, or of the first alone, from the time `[B, M]` in [0, 1]."""
        s = torch.sigmoid(self.slope * conditioning[..., None] + self.offset)[..., None, None]  # [B, M, parts, 1, 1]
        affine = s * self.ends[:, 0] + (1 - s) * self.ends[:, 1]  # [B, M, parts, 2, dim]
        return tuple(Modulation(*part.unsqueeze(3).unbind(2), None) for part in affine.unbind(2))


class SNRLayerNorm(nn.Module):
    """TD-LN as the code of DiMR has it: `s = sigmoid((1 + w) logSNR / 4 + b)` by channel, `s p1 + (1 - s) p2`.

    w = b = 0 and equal ends to begin with; 16 dim numbers a block. The log-SNR of rectified flow at time t is
    `2 log((1 - t) / t)`, held to -20..20.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.ends = nn.Parameter(torch.zeros(2, 2, 2, dim))  # [attention or MLP, end, shift or scale - 1, dim]
        self.slope = nn.Parameter(torch.zeros(2, 2, dim))
        self.offset = nn.Parameter(torch.zeros(2, 2, dim))

    def forward(self, conditioning: Tensor) -> tuple[Modulation, Modulation]:
        """Modulation of attention and of MLP from the time `[B, M]` in [0, 1]."""
        tiny = torch.finfo(conditioning.dtype).tiny
        log_snr = 2 * ((1 - conditioning).clamp(min=tiny).log() - conditioning.clamp(min=tiny).log())
        log_snr = log_snr.clamp(-20, 20)[..., None, None, None]
        affine = between_ends(self.ends[:, 0], self.ends[:, 1], self.slope, self.offset, log_snr)  # [B, M, 2, 2, dim]
        (shift, scale), (mlp_shift, mlp_scale) = (half.unsqueeze(3).unbind(2) for half in affine.unbind(2))
        return Modulation(shift, scale, None), Modulation(mlp_shift, mlp_scale, None)


def between_ends(first: Tensor, second: Tensor, slope: Tensor, offset: Tensor, log_snr: Tensor) -> Tensor:
    """`s first + (1 - s) second` with `s = sigmoid((1 + slope) logSNR / 4 + offset)`; all broadcast."""
    s = torch.sigmoid((1 + slope) * log_snr / 4 + offset)
    return s * first + (1 - s) * second


MODULATIONS = {"adaln_single": AdaLNSingle, "td_ln": TimeDependentLayerNorm, "td_ln_snr": SNRLayerNorm}
