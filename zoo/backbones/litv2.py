"""LITv2: hierarchical transformers on HiLo attention (arXiv:2205.13213).

Convolutional feed-forward layers tell tokens where they are; nothing else does, so images of any size go through. Early
stages have no attention at all. Parameter names are those of the official checkpoints.
"""

from collections.abc import Sequence

import torch
from timm.layers import DropPath, calculate_drop_path_rates, register_notrace_module
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from ...kernels.common.calling import Impl
from ...layers.hilo import HiLo
from ..builder import Model, register_family
from ..hosts.base import Backbone
from ..hosts.blocks import ConvFeedForward, Stage, at_least, equally_long
from ..hosts.swin import patch_stem


class Block(nn.Module):
    """Pre-norm block on `[B, H, W, dim]`; without attention when `attn` is None."""

    def __init__(
        self,
        dim: int,
        *,
        attn: nn.Module | None,
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        norm_layer: type[nn.Module],
        act_layer: type[nn.Module],
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = None if attn is None else norm_layer(dim, **dd)
        self.attn = attn
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = ConvFeedForward(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.attn is not None and self.norm1 is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@register_notrace_module
class DeformConv2d(nn.Conv2d):
    """Deformable convolution whose offsets are a convolution of its input (arXiv:1703.06211); `[B, C, H, W]`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int, device=None, dtype=None):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, device=device, dtype=dtype)
        self.conv_offset = nn.Conv2d(
            in_channels, 2 * kernel_size**2, kernel_size, stride=stride, device=device, dtype=dtype
        )

    def forward(self, input: Tensor) -> Tensor:
        input = at_least(self.kernel_size[0], input)
        wide = torch.promote_types(input.dtype, torch.float32)  # torchvision has no bfloat16 on CPU, nor autocast
        offset, weight = self.conv_offset(input).to(wide), self.weight.to(wide)
        bias = None if self.bias is None else self.bias.to(wide)
        return deform_conv2d(input.to(wide), offset, weight, bias, stride=self.stride).to(input.dtype)


class DeformMerging(nn.Module):
    """Deformable token merging: `[B, H, W, dim]` to `[B, H // 2, W // 2, 2 * dim]`, at least 1 (arXiv:2105.14217)."""

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dconv = DeformConv2d(dim, 2 * dim, 2, stride=2, **dd)
        self.norm_layer = nn.BatchNorm2d(2 * dim, **dd)
        self.act_layer = nn.GELU()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as an ordinary convolution: all offsets zero. Submodules have their own `reset_parameters`."""
        nn.init.zeros_(self.dconv.conv_offset.weight)
        nn.init.zeros_(self.dconv.conv_offset.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        return self.act_layer(self.norm_layer(self.dconv(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)


class LITv2(Backbone):
    """LITv2 for images of any size.

    Args:
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        embed_dim: channels of the first stage; every further stage doubles them.
        depths, num_heads: blocks and heads of each stage.
        windows: side of HiLo's windows in each stage; 1: plain attention, 0: none.
        alpha: share of the heads that see low frequencies; see `foveal.layers.HiLo`.
        mlp_ratio: hidden over embedding width.
        stage_norms: normalise the maps of all stages but the first by `norm1`, `norm2`, ... instead of the last one by
            `norm`, as the official detection and segmentation backbones do.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
        norm_layer, act_layer: layers of the blocks.
        impl: implementation of the windows; see `foveal.kernels.ops.window_attention`.
    """

    stages_name = "layers"

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        windows: Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        stage_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        impl: Impl = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        equally_long(depths=depths, num_heads=num_heads, windows=windows)
        dd = {"device": device, "dtype": dtype}

        def make_block(stage: int, dim: int, drop_path: float) -> Block:
            attn = None
            if windows[stage]:
                options = {"window": windows[stage], "alpha": alpha, "proj_drop": proj_drop_rate, "impl": impl}
                attn = HiLo(dim, num_heads=num_heads[stage], **options, **dd)
            return Block(
                dim,
                attn=attn,
                mlp_ratio=mlp_ratio,
                proj_drop=proj_drop_rate,
                drop_path=drop_path,
                norm_layer=norm_layer,
                act_layer=act_layer,
                **dd,
            )

        channels = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, dim in enumerate(channels):
            blocks: list[nn.Module] = [make_block(i, dim, next(drop_paths)) for _ in range(depths[i])]
            stages.append(Stage(blocks, DeformMerging(dim, **dd) if dim != channels[-1] else None))
        self.patch_embed = patch_stem(in_chans, embed_dim, norm_layer=norm_layer, **dd)
        self.layers = nn.Sequential(*stages)
        self._build_head(
            feature_info=[
                {"num_chs": dim, "reduction": 4 * 2**i, "module": f"layers.{i}.blocks"}
                for i, dim in enumerate(channels)
            ],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=norm_layer,
            stage_norms=stage_norms,
            dd=dd,
        )
        if stage_norms:
            self.norm0 = nn.Identity()
        self.init_weights(needs_reset=False)


SMALL = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
MEDIUM = {**SMALL, "depths": (2, 2, 18, 2)}
BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
TEST = {"embed_dim": 16, "depths": (1, 1, 1), "num_heads": (1, 2, 4), "windows": (0, 2, 1), "alpha": 0.5}
ALPHAS = {f"ziplab_alpha{round(10 * alpha):02d}_in1k": alpha for alpha in (0.0, 0.2, 0.4, 0.5, 0.7, 0.9, 1.0)}
MODELS = {
    "litv2_s": Model(
        "LITv2-Small, trained with drop path 0.2; the tags `ziplab_alpha*_in1k` bring their own `alpha`.", LITv2, SMALL
    ),
    "litv2_m": Model("LITv2-Medium, trained with drop path 0.3.", LITv2, MEDIUM),
    "litv2_b": Model("LITv2-Base, trained with drop path 0.5.", LITv2, BASE),
    "test_litv2": Model("LITv2 for tests.", LITv2, TEST),
}
register_family(
    __name__,
    MODELS,
    cfg={"paper_ids": "arXiv:2205.13213"},
    cfgs={"litv2_b.ziplab_in1k_384": {"crop_pct": 1.0, "crop_mode": "squash"}},
    checkpoint_args={f"litv2_s.{tag}": {"alpha": alpha} for tag, alpha in ALPHAS.items()},
    leaves=(HiLo,),
)
