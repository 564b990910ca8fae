"""Positions of tokens: rotary embedding of explicit 3-D positions."""

from collections.abc import Sequence

import torch
from torch import Tensor


def grid_positions(shape: Sequence[int], *, first_frame: int = 0, device: torch.device | None = None) -> Tensor:
    """Coordinates (t, h, w) of the tokens of a grid in raster order.

    Args:
        shape: tokens along time, height and width.
        first_frame: coordinate of the first frame, as in a rollout that continues a video.

    Returns:
        int64 `[T * H * W, 3]`.
    """
    frames, height, width = shape
    axes = (
        torch.arange(frames, device=device) + first_frame,
        torch.arange(height, device=device),
        torch.arange(width, device=device),
    )
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def default_axes(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with t, h and w: 24, 20, 20 of 64, and in that proportion for other even sizes."""
    space = head_dim // 2 * 10 // 32 * 2
    return head_dim - 2 * space, space, space


def rotary_embedding(
    positions: Tensor, *, axes: Sequence[int], theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles (RoPE, arXiv:2104.09864, one block of channels per axis).

    Args:
        positions: `[S, 3]` or `[B, S, 3]`, any real numbers.
        axes: channels of a head for each axis, even numbers.
        theta: longest wavelength over 2 pi.
        dtype: of the angles and the result.

    Returns:
        two `[1 or B, S, 1, head_dim / 2]`.
    """
    angles = []
    for axis, channels in enumerate(axes):
        exponent = torch.arange(0, channels, 2, device=positions.device, dtype=dtype) / max(channels, 1)
        angles.append(positions[..., axis, None].to(dtype) * theta**-exponent)
    angle = torch.cat(angles, dim=-1).unsqueeze(-2)  # [.., S, 1, head_dim / 2]
    angle = angle if angle.dim() == 4 else angle.unsqueeze(0)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring channel pairs of `[B, S, heads, head_dim]`, in the dtype of the angles; returns that of x."""
    cos, sin = rotary_emb
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
