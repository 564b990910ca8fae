"""Focused linear attention: features that sharpen, and a convolution that restores rank (arXiv:2308.00442)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.ops import linear_attention
from .base import BranchMixin, ProjectedAttention2d
from .positions import resize_positions

EPS = 1e-6  # keeps features and normalisers off zero, as upstream


class FocusedLinearAttention2d(ProjectedAttention2d):
    """Focused linear attention on maps `[B, H, W, dim]` (arXiv:2308.00442, section 4).

    Queries and keys, with positions added to the latter, are ReLU'd and raised to the power `focus` without a change
    of their norm, over all heads together. Every query reads the mean of keys times values, normalised; a depthwise
    convolution of the values, shared by all heads, is added. The cost is linear in the number of tokens.

    Parameters are named as in the official checkpoints: those of the projections, `scale`, `positional_encoding` and
    `dwc`. Maps of other sizes than `grid_size` go through, with positions interpolated on the way.

    Args:
        dim, num_heads, options: as in `ProjectedAttention2d`, without a class token.
        grid_size: rows and columns of the map whose positions are learnt.
        focus: power that the features are raised to; their norm stays.
        kernel_size: side of the convolution, odd.

    Raises:
        ValueError: num_heads does not divide dim, or a class token.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        grid_size: Sequence[int],
        focus: float = 3,
        kernel_size: int = 5,
        **options: Any,
    ):
        super().__init__(dim, num_heads=num_heads, **options)
        if self.class_token:
            raise ValueError("class_token=True must be False: every token needs a place on the map")
        dd: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.grid_size, self.focus = (grid_size[0], grid_size[1]), focus
        head_dim = dim // num_heads
        self.scale = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.positional_encoding = nn.Parameter(torch.empty(1, grid_size[0] * grid_size[1], dim, **dd))
        self.dwc = nn.Conv2d(head_dim, head_dim, kernel_size, padding=kernel_size // 2, groups=head_dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set scales and positions to zero; submodules have their own `reset_parameters`."""
        nn.init.zeros_(self.scale)
        nn.init.zeros_(self.positional_encoding)

    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Make another map the native one: positions are interpolated bicubically, as upstream does."""
        table = self.positional_encoding
        resized = resize_positions(table.detach(), self.grid_size, grid_size)
        self.positional_encoding = nn.Parameter(resized, requires_grad=table.requires_grad)
        self.grid_size = (grid_size[0], grid_size[1])

    def _features(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Sharpened features of `[B, N, dim]`, made in float32 at least: cubes of small numbers vanish in half."""
        wide = torch.promote_types(x.dtype, torch.float32)
        y = (F.relu(x.to(wide)) + EPS) / F.softplus(self.scale.to(wide))
        sharp = y**self.focus
        norms = y.norm(dim=-1, keepdim=True) / sharp.norm(dim=-1, keepdim=True)
        return (sharp * norms).to(dtype)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Tokens `[B, N, heads, d]` to `[B, N, dim]`; the input `x` has no part in it."""
        heads = query.shape[2:]
        placed = key.flatten(2) + resize_positions(self.positional_encoding, self.grid_size, grid_size)
        query, key = (self._features(t, value.dtype).unflatten(2, heads) for t in (query.flatten(2), placed))
        out = linear_attention(query, key, value, mean=True, eps=EPS, impl=self.impl).flatten(2)
        maps = value.transpose(1, 2).flatten(0, 1).mT.unflatten(2, grid_size)  # [B * heads, d, H, W]
        local = self.dwc(maps).flatten(2).mT.unflatten(0, (-1, self.num_heads))  # [B, heads, N, d]
        return out + local.transpose(1, 2).flatten(2)

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention for one map of this size: the state, what is read of it, its sums."""
        return shape[0] * shape[1] * self.dim * (2 * self.dim // self.num_heads + 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, grid_size={self.grid_size}, focus={self.focus}"


class FocusedLinearBranch2d(BranchMixin, FocusedLinearAttention2d):
    """Focused linear attention as a branch of CSWin's blocks."""
