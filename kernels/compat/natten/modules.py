"""NATTEN's modules on our operators: parameters `qkv`, `rpb`, `proj` of its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...common.calling import PerAxis, per_axis
from . import pairs
from .functional import neighborhood_attention


class NeighborhoodAttention(nn.Module):
    """Neighborhood attention with its projections on `[B, *spatial, dim]`.

    Args:
        dim: channels, a multiple of num_heads.
        num_heads: heads.
        kernel_size, stride, dilation, is_causal: the neighborhood, one value, or one per axis; None for the default.
        kernel_size_d, dilation_d: those of the first of three axes, as in NATTEN 0.15.
        rel_pos_bias: learn a bias for every relative position, `rpb`.
        qkv_bias: whether the first projection has a bias.
        qk_scale: factor on query . key; head_dim ** -0.5 when None or 0.
        attn_drop: dropout of weights in training. The weights are computed for it; NATTEN's fused path leaves it out.
        proj_drop: dropout after the output projection.
        pad: complete maps smaller than a window by zeros, right and bottom, as NATTEN before 0.17 does.

    Raises:
        ValueError: arguments that contradict each other.
    """

    rank: ClassVar[int]

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        kernel_size: PerAxis[int],
        kernel_size_d: int | None = None,
        stride: PerAxis[int] | None = 1,
        dilation: PerAxis[int] | None = 1,
        dilation_d: int | None = None,
        is_causal: PerAxis[bool] | None = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pad: bool = False,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.kernel_size = self._per_axis("kernel_size", kernel_size, kernel_size_d)
        self.stride = self._per_axis("stride", 1 if stride is None else stride)
        self.dilation = self._per_axis("dilation", 1 if dilation is None else dilation, dilation_d)
        self.is_causal = per_axis("is_causal", False if is_causal is None else is_causal, self.rank, bool)
        if rel_pos_bias and any(self.is_causal):
            raise ValueError(f"rel_pos_bias=True cannot be combined with is_causal={self.is_causal}")
        if rel_pos_bias and any(w % 2 == 0 for w in self.kernel_size):
            raise ValueError(f"kernel_size={self.kernel_size} must be odd on every axis with rel_pos_bias=True")
        if attn_drop and any(s > 1 for s in self.stride):
            raise ValueError(f"attn_drop={attn_drop} cannot be combined with stride={self.stride}")
        self.pad = pad
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        table = (num_heads, *(2 * w - 1 for w in self.kernel_size))
        self.rpb = nn.Parameter(torch.empty(table)) if rel_pos_bias else None
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _per_axis(self, name: str, value: PerAxis[int], of_depth: int | None = None) -> tuple[int, ...]:
        values = per_axis(name, value, self.rank, int)
        return values if of_depth is None else (of_depth, *values[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Attend within the neighborhood: `[B, *spatial, dim]` to the same."""
        if x.dim() != self.rank + 2:
            raise ValueError(f"x.shape={tuple(x.shape)} must be [B, {self.rank} spatial axes, {self.qkv.in_features}]")
        shape = x.shape[1:-1]
        if self.pad:
            x = _complete(x, [w * d for w, d in zip(self.kernel_size, self.dilation, strict=True)])
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        drops = self.training and self.attn_drop.p > 0
        x = (self._attend_dropped if drops else self._attend)(query, key, value).flatten(-2)
        for axis, n in enumerate(shape, 1):
            x = x.narrow(axis, 0, n)
        return self.proj_drop(self.proj(x))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        given = {"kernel_size": self.kernel_size, "dilation": self.dilation, "is_causal": self.is_causal}
        return neighborhood_attention(query, key, value, stride=self.stride, rpb=self.rpb, scale=self.scale, **given)

    def _attend_dropped(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.movedim(-2, 1) for x in (query * self.scale, key, value))
        given = {"kernel_size": self.kernel_size, "dilation": self.dilation, "is_causal": self.is_causal}
        attn = pairs.qk(self.rank, query, key, rpb=self.rpb, **given).softmax(-1)
        return pairs.av(self.rank, self.attn_drop(attn), value, **given).movedim(1, -2)

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, dilation={self.dilation}, is_causal={self.is_causal}, "
            f"has_bias={self.rpb is not None}"
        )


class NeighborhoodAttention1D(NeighborhoodAttention):
    """`NeighborhoodAttention` on sequences `[B, L, dim]`."""

    rank = 1


class NeighborhoodAttention2D(NeighborhoodAttention):
    """`NeighborhoodAttention` on maps `[B, H, W, dim]`."""

    rank = 2


class NeighborhoodAttention3D(NeighborhoodAttention):
    """`NeighborhoodAttention` on clips `[B, T, H, W, dim]`."""

    rank = 3


def _complete(x: Tensor, least: Sequence[int]) -> Tensor:
    """Zeros after the last token of axes shorter than `least`."""
    missing = [max(0, n - have) for n, have in zip(least, x.shape[1:-1], strict=True)]
    return F.pad(x, [0, 0, *(side for m in reversed(missing) for side in (0, m))]) if any(missing) else x
