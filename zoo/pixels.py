"""Frames of another size: resized until they cover the wanted one, and cut."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cover(clip: Tensor, *, height: int, width: int, at: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """Resizes a clip until it covers `height`×`width`, antialiased, and cuts the rest off.

    Args:
        clip: `[C, T, H, W]`, uint8 in 0..255 or floating point in 0..1.
        at: where the cut is, down and right, 0 to 1; the middle by default.

    Returns:
        float32 in 0..1, `[C, T, height, width]`.
    """
    scale = max(height / clip.shape[2], width / clip.shape[3])
    size = [max(height, round(clip.shape[2] * scale)), max(width, round(clip.shape[3] * scale))]
    frames = clip.transpose(0, 1).float()  # [T, C, H, W]
    if clip.dtype == torch.uint8:
        frames = frames / 255
    if size != list(clip.shape[2:]):
        # antialiased weights add up to 1 only to the last bit
        frames = F.interpolate(frames, size=size, mode="bilinear", antialias=True).clamp(0, 1)
    y, x = (round(share * (n - m)) for share, n, m in zip(at, size, (height, width), strict=True))
    return frames[:, :, y : y + height, x : x + width].transpose(0, 1).contiguous()
