"""Shift of channels by one token: mixing of positions without parameters or products (arXiv:2201.10801)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDES = ((0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 0, 0, 0, 1), (0, 0, 0, 0, 1, 0))  # zeros at the right, left, bottom, top


class Shift2d(nn.Module):
    """Moves four groups of channels of `[B, H, W, dim]` by one token: left, right, up and down, with zeros behind.

    Each of the groups has `dim // divisions` channels, in this order from channel 0 on; the other channels stay
    (arXiv:2201.10801, section 3.2).

    Args:
        dim: channels.
        divisions: 4 at least and dim at most; 4 / divisions of the channels move.

    Raises:
        ValueError: divisions out of range.
    """

    def __init__(self, dim: int, *, divisions: int = 12):
        super().__init__()
        if not 4 <= divisions <= dim:
            raise ValueError(f"divisions={divisions} must lie in [4, dim]; dim={dim}")
        self.dim, self.divisions = dim, divisions

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, dim]`; raises ValueError for another shape."""
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, H, W, {self.dim}]")
        size = self.dim // self.divisions
        groups = x.split([size] * 4 + [self.dim - 4 * size], dim=-1)
        kept = (groups[0][:, :, 1:], groups[1][:, :, :-1], groups[2][:, 1:], groups[3][:, :-1])
        moved = [F.pad(group, zeros) for group, zeros in zip(kept, SIDES, strict=True)]
        return torch.cat([*moved, groups[4]], dim=-1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, divisions={self.divisions}"
