"""Rectified flow: the one place that knows how video and noise are mixed and what the model has to predict.

Liu et al., "Flow Straight and Fast" (arXiv:2209.03003); density and shift of the time from Esser et al., "Scaling
Rectified Flow Transformers" (arXiv:2403.03206, §3.1 and §5.3.2).

Time `t` runs from 0 (data) to 1 (noise), a value per video `[B]` or per group of frames `[B, F]`, `F` a divisor of the
frames. Models take `1000 t`, so their weights work with diffusers' `FlowMatchEulerDiscreteScheduler(shift=s)` and
`UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=s)` as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIMESTEPS = 1000  # what t=1 is called in diffusers


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Moves times towards noise: `s t / (1 + (s - 1) t)`. 1 changes nothing; 3 suits 480p latents, 5 suits 720p."""
    if shift <= 0:
        raise ValueError(f"shift={shift} must be positive")
    return shift * t / (1 + (shift - 1) * t)


def sample_time(
    shape: tuple[int, ...],
    *,
    shift: float = 1.0,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Training times with the logit-normal density, then shifted: `shift_time(sigmoid(N(mean, std)), shift)`.

    Args:
        shape: `(B,)`, or `(B, F)` for a time per group of frames (diffusion forcing, arXiv:2407.01392).
        shift: see `shift_time`.
        mean, std: of the normal distribution.
        generator, device: as in `torch.randn`.

    Returns:
        float32 in (0, 1).
    """
    normal = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    return shift_time(torch.sigmoid(mean + std * normal), shift)


def spread_time(t: Tensor, like: Tensor) -> Tensor:
    """Lays `[B]` or `[B, F]` out so that it multiplies a video `[B, C, T, H, W]`: `[B, 1, 1 or T, 1, 1]`."""
    batch, frames = like.shape[0], like.shape[2]
    if t.ndim not in (1, 2) or t.shape[0] != batch or (t.ndim == 2 and frames % t.shape[1]):
        raise ValueError(
            f"a time of shape {tuple(t.shape)} does not fit a video [B, C, T, H, W] of shape {tuple(like.shape)}: "
            "accepted are [B] and [B, F] with F a divisor of T"
        )
    per_frame = t[:, None] if t.ndim == 1 else t.repeat_interleave(frames // t.shape[1], dim=1)
    return per_frame[:, None, :, None, None]


def add_noise(video: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """`x_t = (1 - t) x_0 + t e` for video and noise `[B, C, T, H, W]`."""
    t = spread_time(t, video).to(video.dtype)
    return (1 - t) * video + t * noise


def velocity(video: Tensor, noise: Tensor) -> Tensor:
    """Target of the model: `dx_t/dt = e - x_0`."""
    return noise - video


def flow_loss(prediction: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Mean squared error in float32, weighted.

    Args:
        prediction, target: `[B, C, T, H, W]`.
        weight: `[B]` or `[B, F]`, not negative; 0 leaves a video or a group of frames out.

    Returns:
        Weighted mean over everything; 0 where all weights are 0.
    """
    error = (prediction.float() - target.float()).square()  # [B, C, T, H, W]
    if weight is None:
        return error.mean()
    spread = spread_time(weight.float(), error).expand(-1, -1, error.shape[2], -1, -1)  # [B, 1, T, 1, 1]
    total = (error.mean(dim=(1, 3, 4), keepdim=True) * spread).sum()
    return total / spread.sum().clamp_min(torch.finfo(torch.float32).tiny)
