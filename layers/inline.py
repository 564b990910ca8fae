"""InLine attention: linear attention that is injective, plus a convolution made from the image (arXiv:2412.06590)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.common.calling import is_plain_call
from ..kernels.ops import linear_attention
from .base import BranchMixin, ProjectedAttention2d, add_convolved, convolve_depthwise


class InLineAttention2d(ProjectedAttention2d):
    """InLine attention on maps `[B, H, W, dim]`, or on their tokens after a class token (arXiv:2412.06590).

    Weights of a query sum to one because the mean value, not a normaliser, carries the sum (equation 5): queries read
    the covariance of keys and values around their means. A depthwise 3x3 convolution of the values is added, whose
    weights a small network makes from the mean token of the layer's input; a class token counts in the mean and in the
    covariance and is not convolved. The cost is linear in the number of tokens.

    Parameters are named as in the official checkpoints: those of the projections and `residual`.

    Args:
        dim, num_heads, options: as in `ProjectedAttention2d`.
    """

    def __init__(self, dim: int, *, num_heads: int, **options: Any):
        super().__init__(dim, num_heads=num_heads, **options)
        dd: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=num_heads, **dd),
            nn.GELU(),
            nn.Conv1d(dim, 9 * dim, 1, groups=num_heads, **dd),
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Tokens `[B, N, heads, d]` and the input `[B, N, dim]`, whose mean makes the convolution, to `[B, N, dim]`."""
        scale = (self.dim // self.num_heads) ** -0.5
        out = linear_attention(query, key, value, centered=True, scale=scale, impl=self.impl)
        first = int(self.class_token)
        weight = self.residual(x.mean(1)[:, :, None]).view(-1, self.dim, 3, 3)
        maps = value[:, first:].flatten(2).unflatten(1, grid_size)
        if not first and maps.device.type == "cpu" and self.impl != "reference" and is_plain_call():
            return add_convolved(out, maps, weight.unsqueeze(2)).flatten(2)
        local = convolve_each(maps, weight).flatten(1, 2)
        return out.flatten(2) + (F.pad(local, (0, 0, first, 0)) if first else local)

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of attention and convolution for one image; `shape` is H and W, or tokens and dim."""
        tokens = shape[0] if self.class_token else shape[0] * shape[1]
        return tokens * self.dim * (2 * self.dim // self.num_heads + 9)


class InLineBranch2d(BranchMixin, InLineAttention2d):
    """InLine attention as a branch of CSWin's blocks; the convolution is made from their input before the norm."""


def convolve_each(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise 3x3 convolution of every map `[B, H, W, C]` by weights of its own, `[B, C, 3, 3]`; zero-padded."""
    batch, rows, columns, dim = x.shape
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        alone = zip(x.split(1), weight.unsqueeze(2), strict=True)
        return torch.cat([convolve_depthwise(image, w) for image, w in alone])
    if not torch.compiler.is_compiling():
        maps = x.permute(0, 3, 1, 2).reshape(1, batch * dim, rows, columns)
        out = F.conv2d(maps, weight.reshape(batch * dim, 1, 3, 3), padding=1, groups=batch * dim)
        return out.view(batch, dim, rows, columns).permute(0, 2, 3, 1)
    # Compilers fuse products of shifted maps, and graphs with a free batch size cannot have it as a number of groups.
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    parts = [
        weight[:, None, None, :, i, j] * padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)
    ]
    return sum(parts[1:], parts[0])
