"""Poses in space from poses in the image, by attention with convolved queries, keys and values (ConvFormer).

After arXiv:2304.02147, of which no code is public: sizes, groups and the fusion over all frames are our choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers.convolved import ConvolvedAttention
from .blocks import PreNormBlock


class PoseLifter(nn.Module):
    """From joints in the image to joints in space.

    Blocks among the joints of a frame come first; then a convolution over all frames and neighbouring joints gives each
    joint what the whole sequence says of it; then come blocks among the frames, whose tokens are whole poses.

    Args:
        joints, frames: of a sequence.
        dim: channels of a joint.
        joint_depth, frame_depth: blocks among joints, and among frames.
        num_heads: of all blocks, a divisor of dim.
        kernels: odd sizes of the convolutions of queries, keys and values.

    Raises:
        ValueError: heads that do not divide the channels, or kernels that are not odd.
    """

    def __init__(
        self,
        *,
        joints: int = 17,
        frames: int = 27,
        dim: int = 32,
        joint_depth: int = 2,
        frame_depth: int = 2,
        num_heads: int = 4,
        kernels: Sequence[int] = (1, 3, 5),
    ):
        super().__init__()
        wide = joints * dim
        self.embed, self.names = nn.Linear(2, dim), nn.Parameter(0.02 * torch.randn(joints, dim))

        def blocks(width: int, count: int) -> nn.ModuleList:
            made = (ConvolvedAttention(width, num_heads=num_heads, kernels=kernels) for _ in range(count))
            return nn.ModuleList(PreNormBlock(width, attention) for attention in made)

        self.joint_blocks, self.frame_blocks = blocks(dim, joint_depth), blocks(wide, frame_depth)
        self.profile = nn.Conv2d(dim, dim, (frames, 3), padding=(0, 1), groups=dim)
        self.norm, self.head = nn.LayerNorm(wide), nn.Linear(wide, 3 * joints)

    def forward(self, poses: Tensor) -> Tensor:
        """`[B, frames, joints, 2]` to `[B, frames, joints, 3]`."""
        x = self.embed(poses) + self.names
        shape = x.shape
        x = x.flatten(0, 1)
        for block in self.joint_blocks:
            x = block(x)
        x = x.view(shape)
        x = (x + self.profile(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).flatten(2)
        for block in self.frame_blocks:
            x = block(x)
        return self.head(self.norm(x)).unflatten(-1, (-1, 3))


def joint_errors(found: Tensor, target: Tensor) -> Tensor:
    """Mean distance of joints per sequence, `[B]`, of `[B, frames, joints, 3]` (MPJPE)."""
    return (found - target).norm(dim=-1).mean((1, 2))


def aligned(found: Tensor, target: Tensor) -> Tensor:
    """The similarity transform of each pose that comes closest to its target (Procrustes).

    Args:
        found, target: `[…, joints, 3]`.

    Returns:
        found, moved, turned and scaled.
    """
    center, aim = found.mean(-2, keepdim=True), target.mean(-2, keepdim=True)
    a, b = found - center, target - aim
    u, s, vt = torch.linalg.svd(a.mT @ b)
    sign = torch.ones_like(s)
    sign[..., -1] = torch.linalg.det(u @ vt).sign()  # a turn, and no reflection
    scale = (s * sign).sum(-1, keepdim=True)[..., None] / a.square().sum((-2, -1), keepdim=True).clamp(min=1e-12)
    return scale * (a @ (u * sign[..., None, :]) @ vt) + aim


def velocity_errors(found: Tensor, target: Tensor) -> Tensor:
    """Mean distance of the joints' steps from frame to frame per sequence, `[B]` (MPJVE)."""
    return joint_errors(found.diff(dim=1), target.diff(dim=1))
