"""The layout of SPACH: a mixer beside a depthwise convolution, at one resolution or more (arXiv:2108.13002)."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import DropPath, GroupNorm1, Mlp, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from .base import Host, stage_grids
from .blocks import AttentionFactory, DepthwiseConv, Layout
from .deit import LayerNorm1e6
from .patches import CompletedPatchConv2d
from .swin import patch_stem


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
        norm_layer: Callable[..., nn.Module],
        act_layer: type[nn.Module],
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.layer_scale = layer_scale
        self.spatial_func = mixer
        self.norm1 = None if mixer is None else norm_layer(dim, **dd)
        self.gamma_1 = None if mixer is None else nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.cpe_net = DepthwiseConv(dim, **dd)
        self.norm2 = norm_layer(dim, **dd)
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


class Downsample(nn.Sequential):
    """A 2x2 convolution and a norm of whole maps: `[B, H, W, dim]` to `[B, H / 2, W / 2, 2 * dim]`, rounded up."""

    def __init__(self, dim: int, **dd):
        conv = CompletedPatchConv2d(dim, 2 * dim, 2, stride=2, bias=False, **dd)
        super().__init__(conv, GroupNorm1(2 * dim, **dd))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Spach(Host):
    """SPACH's layout around any mixer of tokens on maps `[B, H, W, dim]`.

    Args:
        attn: makes the mixer of a block; see `foveal.zoo.hosts.Place`. Where it returns None, and without `attn`, the
            block's depthwise convolution is all.
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        img_size: native input size, for which mixers may learn positions.
        patch_size: side of the patches.
        embed_dim, depths: channels of the first stage, blocks of each stage.
        num_heads: heads in every stage.
        halve: whether each further stage has half the rows and columns and twice the channels.
        mlp_ratio: hidden over embedding width.
        layer_scale: initial value of the mixers' residual scale.
        stage_norms: normalise each stage's map by `norm0`, `norm1`, ... instead of the last one by `norm`.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
        norm_layer, act_layer: layers of the blocks.
        impl: implementation of the mixers, handed on to `attn`.
        attn_options: further arguments of `attn`; a list or tuple has one entry per stage.
    """

    stages_name: ClassVar[str] = "layers"

    def __init__(
        self,
        *,
        attn: AttentionFactory | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: int = 2,
        halve: bool = True,
        mlp_ratio: float = 2.0,
        layer_scale: float = 1e-4,
        stage_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = LayerNorm1e6,
        act_layer: type[nn.Module] = nn.GELU,
        impl: str = "auto",
        device=None,
        dtype=None,
        **attn_options: Any,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.depths = tuple(depths)
        channels = [embed_dim * 2 ** (i * halve) for i in range(len(depths))]
        reductions = [patch_size * 2 ** (i * halve) for i in range(len(depths))]
        drop_paths = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        layout = Layout(
            attn=attn,
            attn_options=attn_options,
            channels=channels,
            depths=depths,
            num_heads=[num_heads] * len(depths),
            grids=stage_grids(to_2tuple(img_size), reductions),
            options={"proj_drop": proj_drop_rate, "impl": impl, **dd},
        )

        def make_block(stage: int, index: int) -> Block:
            return Block(
                channels[stage],
                mixer=layout.attention(layout.place(stage, index)),
                mlp_ratio=mlp_ratio,
                layer_scale=layer_scale,
                proj_drop=proj_drop_rate,
                drop_path=next(drop_paths),
                norm_layer=norm_layer,
                act_layer=act_layer,
                **dd,
            )

        self.patch_embed = patch_stem(in_chans, embed_dim, norm_layer=norm_layer, patch_size=patch_size, **dd)
        self._build_stages(
            [[make_block(i, j) for j in range(depth)] for i, depth in enumerate(depths)],
            ways_down=[Downsample(dim, **dd) if halve else None for dim in channels[:-1]],
            channels=channels,
            reductions=reductions,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=norm_layer,
            stage_norms=stage_norms,
            dd=dd,
        )
