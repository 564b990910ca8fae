"""Partial attention: a convolution of some channels beside a gate or attention of the others (arXiv:2502.01303)."""

import math
from typing import Any, Literal

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.common.symbolic import known
from .base import ProjectedAttention2d, join_heads

NEAR = 20  # distances up to this have a bucket each; up to 8 times as far there are as many again, by logarithm
BUCKETS = 4 * NEAR + 1  # from -2 * NEAR to 2 * NEAR, of which distances use the upper half (arXiv:2107.14222, eq. 18)


def distance_buckets(grid_size: tuple[int, int], device: torch.device) -> Tensor:
    """Bucket of the rounded Euclidean distance of each pair of tokens, `[H * W, H * W]`, in [2 * NEAR, 4 * NEAR]."""
    rows, columns = (torch.arange(n, device=device) for n in grid_size)
    square = (rows[:, None] - rows).square()[:, None, :, None] + (columns[:, None] - columns).square()[None, :, None, :]
    distance = square.float().sqrt().round().flatten(2).flatten(0, 1)
    far = NEAR + (distance.clamp(min=NEAR) / NEAR).log() / math.log(8) * NEAR
    return torch.where(distance <= NEAR, distance, far.round().clamp(max=2 * NEAR)).long() + 2 * NEAR


class DistanceBias(nn.Module):
    """A bias per head and bucket of distance, spread over all pairs of a map's tokens."""

    def __init__(self, num_heads: int, *, device=None, dtype=None):
        super().__init__()
        self.lookup_table_bias = nn.Parameter(torch.empty(num_heads, BUCKETS, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start without a bias."""
        nn.init.zeros_(self.lookup_table_bias)

    def forward(self, grid_size: tuple[int, int]) -> Tensor:
        """`[heads, H * W, H * W]`."""
        return self.lookup_table_bias[:, distance_buckets(grid_size, self.lookup_table_bias.device)]


class DistanceAttention2d(ProjectedAttention2d):
    """Attention of all tokens of a map with a bias per distance (iRPE's bias of keys, arXiv:2107.14222).

    The table `rpe_k.lookup_table_bias` `[heads, 81]` serves maps of any size. Arguments as in `ProjectedAttention2d`.
    """

    def __init__(self, dim: int, *, num_heads: int, **options: Any):
        super().__init__(dim, num_heads=num_heads, **options)
        self.rpe_k = DistanceBias(num_heads, device=options.get("device"), dtype=options.get("dtype"))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Tokens `[B, N, heads, d]` to `[B, N, dim]`."""
        bias = self.rpe_k(grid_size)[None].to(query.dtype)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        return join_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=bias))

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention for one map of this size."""
        return 2 * (shape[0] * shape[1]) ** 2 * self.dim


class StyleGate2d(nn.Module):
    """Scales each channel of `[B, dim, H, W]` by a gate of all channels' means and standard deviations."""

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.cfc1 = nn.Conv2d(dim, dim, (1, 2), bias=False, **dd)
        self.bn = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        single = known(tokens.shape[-1] == 1)  # whose deviation is none
        spread = torch.zeros_like(tokens[..., 0]) if single else tokens.std(-1)
        style = torch.stack([tokens.mean(-1), spread], dim=-1)[:, :, None]  # [B, dim, 1, 2]
        return x * F.hardsigmoid(self.bn(self.cfc1(style)))


class PlaceGate2d(nn.Module):
    """Scales one half of the channels of `[B, dim, H, W]` by a gate of each token, and mixes the other half."""

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mixed = dim // 2
        self.gated = dim - self.mixed
        self.conv = nn.Conv2d(self.mixed, self.mixed, 1, bias=False, **dd)
        self.conv_attn = nn.Conv2d(self.gated, 1, 1, bias=False, **dd)
        self.norm = nn.BatchNorm2d(self.gated, **dd)
        self.norm2 = nn.BatchNorm2d(self.mixed, **dd)

    def forward(self, x: Tensor) -> Tensor:
        gated, mixed = x.split([self.gated, self.mixed], dim=1)
        gated = self.norm(gated * F.hardsigmoid(self.conv_attn(gated)))
        return torch.cat([gated, self.conv(self.norm2(mixed))], dim=1)


class PartialAttention2d(nn.Module):
    """A 3x3 convolution of the first channels of `[B, H, W, dim]`, beside a gate or attention of the others.

    Parameters are named as in the official code: `partial_conv3`, `attn`, `norm`.

    Args:
        dim: channels.
        kind: "gate" scales channels by their mean and deviation and normalises then; "attn" normalises first.
        num_heads: heads of "attn"; a divisor of the channels that are not convolved.
        share: the part of the channels that is convolved is 1 / share.
        proj_drop: dropout after the output projection of "attn".

    Raises:
        ValueError: another kind.
    """

    def __init__(
        self,
        dim: int,
        *,
        kind: Literal["gate", "attn"],
        num_heads: int = 4,
        share: int = 4,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if kind not in ("gate", "attn"):
            raise ValueError(f"kind={kind!r} must be 'gate' or 'attn'")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.kind, self.convolved = dim, kind, dim // share
        rest = dim - self.convolved
        self.partial_conv3 = nn.Conv2d(self.convolved, self.convolved, 3, padding=1, bias=False, **dd)
        if kind == "gate":
            self.attn, self.norm = StyleGate2d(rest, **dd), nn.BatchNorm2d(rest, **dd)
        else:
            self.attn = DistanceAttention2d(rest, num_heads=num_heads, qkv_bias=False, proj_drop=proj_drop, **dd)
            self.norm = LayerNorm2d(rest, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, dim]`; raises ValueError for another shape."""
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, H, W, {self.dim}]")
        near, rest = x.permute(0, 3, 1, 2).split([self.convolved, self.dim - self.convolved], dim=1)
        if self.kind == "gate":
            rest = self.norm(self.attn(rest))
        else:
            rest = self.attn(self.norm(rest).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return torch.cat([self.partial_conv3(near), rest], dim=1).permute(0, 2, 3, 1)
