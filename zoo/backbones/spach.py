"""SPACH: one layout around three ways to mix tokens, convolution, attention and MLP (arXiv:2108.13002).

Each block has a depthwise convolution beside its mixer, which tells tokens where they are, so images of any size go
through models without MLPs along tokens; those are learnt for one input size. Models have one resolution, or four
(`spach_ms_*`). Parameter names are those of the official checkpoints but for two norms.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from timm.layers import Attention, DropPath, GroupNorm1, Mlp, calculate_drop_path_rates, to_2tuple
from timm.models import checkpoint
from torch import Tensor, nn

from ...layers.mixing import TokenMlp2d
from ..builder import DIGITS_CFG, Model, register_family
from ..conversion import Conversion
from ..hosts.base import Backbone, NumberedHost, stage_grids
from ..hosts.blocks import Blocks
from ..hosts.deit import LayerNorm1e6
from ..hosts.patches import CompletedPatchConv2d

Mixer = Literal["conv", "attn", "mlp"]


class MapAttention(Attention):
    """timm's attention of all tokens of `[B, H, W, dim]`."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x.flatten(1, 2)).view(x.shape)

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention for one map of this size."""
        return 2 * (shape[0] * shape[1]) ** 2 * self.num_heads * self.head_dim


def make_mixer(
    kind: Mixer, dim: int, *, num_heads: int, grid_size: tuple[int, int], proj_drop: float, **shared: Any
) -> nn.Module | None:
    """The mixer of a block; None where the depthwise convolution is all."""
    if kind == "attn":
        dd = {key: shared[key] for key in ("device", "dtype")}
        return MapAttention(dim, num_heads=num_heads, qkv_bias=True, proj_drop=proj_drop, **dd)
    if kind == "mlp":
        return TokenMlp2d(dim, grid_size=grid_size, drop=proj_drop, **shared)
    if kind != "conv":
        raise ValueError(f"mixers={kind!r} must each be 'conv', 'attn' or 'mlp'")
    return None


class PositionConv(nn.Module):
    """Depthwise 3x3 convolution of `[B, H, W, dim]`."""

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.net = nn.Sequential(nn.Identity(), conv)  # official names count a change of layout

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """A mixer and a convolution side by side, then a feed-forward layer, on `[B, H, W, dim]`."""

    def __init__(
        self,
        dim: int,
        *,
        mixer: nn.Module | None,
        mlp_ratio: float,
        layer_scale: float,
        proj_drop: float,
        drop_path: float,
        act_layer: type[nn.Module],
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.layer_scale = layer_scale
        self.spatial_func = mixer
        self.norm1 = None if mixer is None else LayerNorm1e6(dim, **dd)
        self.gamma_1 = None if mixer is None else nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.cpe_net = PositionConv(dim, **dd)
        self.norm2 = LayerNorm1e6(dim, **dd)
        self.channel_func = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the layer scale to its initial value; submodules have their own `reset_parameters`."""
        if self.gamma_1 is not None:
            nn.init.constant_(self.gamma_1, self.layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cpe_net(x)
        if self.spatial_func is not None and self.norm1 is not None:
            y = y + self.drop_path(self.gamma_1 * self.spatial_func(self.norm1(x)))
        x = x + y
        return x + self.drop_path(self.channel_func(self.norm2(x)))


class Stem(nn.Module):
    """Patches and a norm: `[B, in_chans, H, W]` to `[B, H / side, W / side, dim]`, rounded up."""

    def __init__(self, in_chans: int, dim: int, side: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = CompletedPatchConv2d(in_chans, dim, side, stride=side, **dd)
        self.norm = LayerNorm1e6(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """A 2x2 convolution and a norm of whole maps: `[B, H, W, dim]` to `[B, H / 2, W / 2, 2 * dim]`, rounded up."""

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        conv = CompletedPatchConv2d(dim, 2 * dim, 2, stride=2, bias=False, **dd)
        self.net = nn.Sequential(nn.Identity(), nn.Sequential(conv, GroupNorm1(2 * dim, **dd)))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Spach(NumberedHost):
    """SPACH of one resolution or more.

    Args:
        mixers: "conv", "attn" or "mlp" of every block, stage by stage.
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        img_size: the input size that MLPs along tokens are learnt for; others take any.
        patch_size: side of the patches.
        embed_dim, num_heads: channels and heads. Further stages double the channels and keep the heads.
        mlp_ratio: hidden over embedding width.
        layer_scale: initial value of the mixers' residual scale.
        stage_norms: normalise each stage's map by `norm0`, `norm1`, ... instead of the last one by `norm`.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
        act_layer: activation.
    """
