"""One face for the autoencoders of diffusers: pixels in 0..1 to normalised latents and back, and how much smaller.

Latents are normalised as the models that were trained on them expect: by channel for Wan and LTX, by one factor for
HunyuanVideo and CogVideoX, as they are for the tiny autoencoders, which see a video frame by frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    AutoencoderTiny,
)
from torch import Tensor, nn

SUPPORTED = (
    AutoencoderKLWan,
    AutoencoderKLLTXVideo,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLCogVideoX,
    AutoencoderTiny,
)


@dataclass(frozen=True)
class LatentSpace:
    """Map between pixels and the tensors that a model is given.

    Attributes:
        channels: of the latents.
        time, space: pixels of a latent along time and along height and width.
        mean, std: of the raw latents, per channel; normalised = (raw - mean) / std.
    """

    channels: int
    time: int
    space: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def frames(self, frames: int) -> int:
        """Latent frames of a clip; the first pixel frame has one of its own when time is compressed."""
        return (frames - 1) // self.time + 1


def latent_space(vae: nn.Module) -> LatentSpace:
    """Reads off an autoencoder how it compresses.

    Raises:
        TypeError: none of `SUPPORTED`.
    """
    config: Any = getattr(vae, "config", None)
    if isinstance(vae, AutoencoderKLWan):
        halvings = config.temperal_downsample
        space = 2 ** len(halvings) * (config.patch_size or 1)
        mean, std = tuple(config.latents_mean), tuple(config.latents_std)
        return LatentSpace(config.z_dim, 2 ** sum(halvings), space, mean, std)
    if isinstance(vae, AutoencoderKLLTXVideo):
        mean = tuple(vae.latents_mean.tolist())
        std = tuple((vae.latents_std / config.scaling_factor).tolist())
        return LatentSpace(
            config.latent_channels, vae.temporal_compression_ratio, vae.spatial_compression_ratio, mean, std
        )
    if isinstance(vae, AutoencoderKLHunyuanVideo | AutoencoderKLCogVideoX):
        channels = config.latent_channels
        time, space = int(config.temporal_compression_ratio), 2 ** (len(config.block_out_channels) - 1)
        return LatentSpace(channels, time, space, (0.0,) * channels, (1 / config.scaling_factor,) * channels)
    if isinstance(vae, AutoencoderTiny):
        channels = config.latent_channels
        space = config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1)
        mean, std = (config.shift_factor,) * channels, (1 / config.scaling_factor,) * channels
        return LatentSpace(channels, 1, space, mean, std)
    names = ", ".join(kind.__name__ for kind in SUPPORTED)
    raise TypeError(f"vae must be one of {names}, got {type(vae).__name__}")


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(1, -1, 1, 1, 1)


@torch.no_grad()
def encode(vae: Any, video: Tensor) -> Tensor:
    """Pixels `[B, 3, T, H, W]` in 0..1 → normalised latents `[B, C, T', H', W']` in float32, the posterior's mode.

    They must be on the device where the autoencoder computes, which need not be where its weights are (offloading).
    """
    space = latent_space(vae)
    pixels = (2 * video - 1).to(vae.dtype)
    if isinstance(vae, AutoencoderTiny):
        frames = vae.encode(pixels.transpose(1, 2).flatten(0, 1)).latents  # [B*T, C, H', W']
        raw = frames.unflatten(0, (len(video), -1)).transpose(1, 2)
    else:
        raw = vae.encode(pixels).latent_dist.mode()
    return (raw.float() - _per_channel(space.mean, raw)) / _per_channel(space.std, raw)


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Normalised latents `[B, C, T', H', W']` → pixels `[B, 3, T, H, W]` in float32, 0..1.

    They must be on the device where the autoencoder computes, which need not be where its weights are (offloading).
    """
    space = latent_space(vae)
    raw = latents.float() * _per_channel(space.std, latents) + _per_channel(space.mean, latents)
    raw = raw.to(vae.dtype)
    if isinstance(vae, AutoencoderTiny):
        frames = vae.decode(raw.transpose(1, 2).flatten(0, 1)).sample
        pixels = frames.unflatten(0, (len(latents), -1)).transpose(1, 2)
    elif isinstance(vae, AutoencoderKLLTXVideo) and vae.config["timestep_conditioning"]:
        pixels = vae.decode(raw, raw.new_zeros(len(raw))).sample  # a decoder that denoises, given clean latents
    else:
        pixels = vae.decode(raw).sample
    return (pixels.float() / 2 + 0.5).clamp(0, 1)
