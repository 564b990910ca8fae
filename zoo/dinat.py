"""NAT and DiNAT: hierarchical transformers on neighborhood attention (arXiv:2204.07143, arXiv:2209.15001).

One architecture; DiNAT dilates every other block. Parameter names are those of the official checkpoints, which load
unchanged, as do the `transformers` conversions on the Hugging Face hub.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, register_notrace_module
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.neighborhood import NeighborhoodAttention2d
from .backbone import Backbone, Stage
from .builder import build_backbone, imagenet_cfg
from .dinat_checkpoint import checkpoint_filter_fn

register_notrace_module(NeighborhoodAttention2d)  # torch.fx cannot trace its checks of shapes


class Block(nn.Module):
    """Pre-norm transformer block on `[B, H, W, dim]`, with optional layer scale `gamma1`, `gamma2`."""

    def __init__(
        self,
        dim: int,
        *,
        attn: nn.Module,
        mlp_ratio: float,
        layer_scale: float | None,
        proj_drop: float,
        drop_path: float,
        norm_layer: type[nn.Module],
        act_layer: type[nn.Module],
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.layer_scale = layer_scale
        self.gamma1 = None if layer_scale is None else nn.Parameter(torch.empty(dim, **dd))
        self.gamma2 = None if layer_scale is None else nn.Parameter(torch.empty(dim, **dd))
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the layer scales to their initial value; submodules have their own `reset_parameters`."""
        if self.gamma1 is not None and self.gamma2 is not None:
            nn.init.constant_(self.gamma1, self.layer_scale)
            nn.init.constant_(self.gamma2, self.layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.norm1(x))
        x = x + self.drop_path1(y if self.gamma1 is None else self.gamma1 * y)
        y = self.mlp(self.norm2(x))
        return x + self.drop_path2(y if self.gamma2 is None else self.gamma2 * y)


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2: `[B, in_chans, H, W]` to `[B, ceil(H / 4), ceil(W / 4), dim]`."""

    def __init__(self, in_chans: int, dim: int, *, norm_layer: type[nn.Module], device=None, dtype=None):
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=3, stride=2, padding=1, device=device, dtype=dtype)
        self.proj = nn.Sequential(conv(in_chans, dim // 2), conv(dim // 2, dim))
        self.norm = norm_layer(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2: `[B, H, W, dim]` to `[B, ceil(H / 2), ceil(W / 2), 2 * dim]`."""

    def __init__(self, dim: int, *, norm_layer: type[nn.Module], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, bias=False, **dd)
        self.norm = norm_layer(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def block_dilations(dilation: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Dilation of every block of a stage: as listed, or 1 and `dilation` in turn when a single number is given."""
    if isinstance(dilation, int):
        return tuple(dilation if i % 2 else 1 for i in range(depth))
    if len(dilation) != depth:
        raise ValueError(f"dilations={tuple(dilation)} must be one number, or one for each of {depth} blocks")
    return tuple(dilation)


class DiNAT(Backbone):
    """NAT and DiNAT for images of any size.

    Args:
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        embed_dim: channels of the first stage; every further stage doubles them.
        depths, num_heads: blocks and heads of each stage.
        window: side of the neighborhood, odd.
        dilations: per stage, the dilation of its odd-numbered blocks (the others have 1), or one number per block.
            Dilations belong to the weights and do not follow the input size.
        mlp_ratio: hidden over embedding width.
        layer_scale: initial value of the residual scales; none when None.
        stage_norms: normalise each stage's map by `norm0`, `norm1`, ... instead of the last one by `norm`, as the
            official detection and segmentation backbones do.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
        norm_layer, act_layer: layers of the blocks.
        qk_norm: norm layer for queries and keys; none when None.
        impl: implementation of the attention; see `foveal.kernels.ops.na2d`.
        img_size: nominal input size, only recorded for timm's data configuration.
    """

    stem_layer: ClassVar[Callable[..., nn.Module]] = ConvStem
    downsample_layer: ClassVar[Callable[..., nn.Module]] = ConvDownsample

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        window: int = 7,
        dilations: Sequence[int | Sequence[int]] = (1, 1, 1, 1),
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        stage_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        qk_norm: Callable[..., nn.Module] | None = None,
        impl: str = "auto",
        img_size: int | tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not len(depths) == len(num_heads) == len(dilations):
            raise ValueError(f"depths={depths}, num_heads={num_heads} and dilations={dilations} must be equally long")
        dd = {"device": device, "dtype": dtype}
        make_attn = partial(
            NeighborhoodAttention2d,
            window=window,
            rpb=True,
            qk_norm=qk_norm,
            pad=True,
            proj_drop=proj_drop_rate,
            impl=impl,
            **dd,
        )
        make_block = partial(
            Block,
            mlp_ratio=mlp_ratio,
            layer_scale=layer_scale,
            proj_drop=proj_drop_rate,
            norm_layer=norm_layer,
            act_layer=act_layer,
            **dd,
        )
        channels = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, dim in enumerate(channels):
            blocks = [
                make_block(
                    dim, attn=make_attn(dim, num_heads=num_heads[i], dilation=dilation), drop_path=next(drop_paths)
                )
                for dilation in block_dilations(dilations[i], depths[i])
            ]
            last = i == len(channels) - 1
            stages.append(Stage(blocks, None if last else self.downsample_layer(dim, norm_layer=norm_layer, **dd)))
        self.patch_embed = self.stem_layer(in_chans, embed_dim, norm_layer=norm_layer, **dd)
        self.add_module(self.stages_name, nn.Sequential(*stages))
        self._build_head(
            feature_info=[
                {"num_chs": dim, "reduction": 4 * 2**i, "module": f"{self.stages_name}.{i}.blocks"}
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
        self.init_weights(needs_reset=False)


def _cfg(name: str, **overrides) -> dict:
    paper = "arXiv:2204.07143" if name.startswith("natten_nat") else "arXiv:2209.15001"
    defaults = {
        "first_conv": "patch_embed.proj.0",
        "license": "mit",
        "paper_ids": paper,
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    }
    return imagenet_cfg(name, **(defaults | overrides))


AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
DIGITS = {
    "num_classes": 10,
    "input_size": (1, 32, 32),
    "pool_size": (2, 2),
    "crop_pct": 1.0,
    "mean": (0.5,),
    "std": (0.5,),
    "license": "apache-2.0",
    "origin_url": None,
}
CHECKPOINTS: dict[str, dict] = {
    "natten_nat_m.shi_in1k": {},
    "natten_nat_t.shi_in1k": {},
    "natten_nat_s.shi_in1k": {},
    "natten_nat_b.shi_in1k": {},
    "natten_dinat_m.shi_in1k": {},
    "natten_dinat_t.shi_in1k": {},
    "natten_dinat_s.shi_in1k": {},
    "natten_dinat_b.shi_in1k": {},
    "natten_dinat_l.shi_in22k_ft_in1k": {},
    "natten_dinat_l.shi_in22k": {"num_classes": 21841},
    "natten_dinat_l_384.shi_in22k_ft_in1k_384": AT_384,
    "natten_dinat_l_11x11_384.shi_in22k_ft_in1k_384": AT_384,
    "natten_dinat_l_11x11_384.shi_in22k": {"num_classes": 21841},
    "natten_dinat_pico.digits": DIGITS,
}
default_cfgs = generate_default_cfgs({name: _cfg(name, **overrides) for name, overrides in CHECKPOINTS.items()})


def _create_dinat(variant: str, pretrained: bool, **kwargs) -> DiNAT:
    return build_backbone(DiNAT, variant, pretrained, filter_fn=checkpoint_filter_fn, **kwargs)


MINI = {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0}
TINY = {"embed_dim": 64, "depths": (3, 4, 18, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0}
SMALL = {"embed_dim": 96, "depths": (3, 4, 18, 5), "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0}
BASE = {"embed_dim": 128, "depths": (3, 4, 18, 5), "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0, "layer_scale": 1e-5}
LARGE = {"embed_dim": 192, "depths": (3, 4, 18, 5), "num_heads": (6, 12, 24, 48), "mlp_ratio": 2.0}


@register_model
def natten_nat_m(pretrained: bool = False, **kwargs) -> DiNAT:
    """NAT-Mini, trained with drop path 0.2."""
    model_args = MINI
    return _create_dinat("natten_nat_m", pretrained, **(model_args | kwargs))


@register_model
def natten_nat_t(pretrained: bool = False, **kwargs) -> DiNAT:
    """NAT-Tiny, trained with drop path 0.2."""
    model_args = dict(TINY)
    return _create_dinat("natten_nat_t", pretrained, **(model_args | kwargs))


@register_model
def natten_nat_s(pretrained: bool = False, **kwargs) -> DiNAT:
    """NAT-Small, trained with drop path 0.3."""
    model_args = {**SMALL, "layer_scale": 1e-5}
    return _create_dinat("natten_nat_s", pretrained, **(model_args | kwargs))


@register_model
def natten_nat_b(pretrained: bool = False, **kwargs) -> DiNAT:
    """NAT-Base, trained with drop path 0.5."""
    model_args = dict(BASE)
    return _create_dinat("natten_nat_b", pretrained, **(model_args | kwargs))


@register_model
def natten_dinat_m(pretrained: bool = False, **kwargs) -> DiNAT:
    """DiNAT-Mini, trained with drop path 0.2."""
    model_args = {**MINI, "dilations": (8, 4, 2, 1)}
    return _create_dinat("natten_dinat_m", pretrained, **(model_args | kwargs))


@register_model
def natten_dinat_t(pretrained: bool = False, **kwargs) -> DiNAT:
    """DiNAT-Tiny, trained with drop path 0.2."""
    model_args = {**TINY, "dilations": (8, 4, 2, 1)}
    return _create_dinat("natten_dinat_t", pretrained, **(model_args | kwargs))


@register_model
def natten_dinat_s(pretrained: bool = False, **kwargs) -> DiNAT:
    """DiNAT-Small, trained with drop path 0.3."""
    model_args = {**SMALL, "dilations": (8, 4, 2, 1)}
    return _create_dinat("natten_dinat_s", pretrained, **(model_args | kwargs))


@register_model
def natten_dinat_b(pretrained: bool = False, **kwargs) -> DiNAT:
    """DiNAT-Base, trained with drop path 0.5."""
    model_args = {**BASE, "dilations": (8, 4, 2, 1)}
    return _create_dinat("natten_dinat_b", pretrained, **(model_args | kwargs))


@register_model
def natten_dinat_l(pretrained: bool = False, **kwargs) -> DiNAT:
    """DiNAT-Large, fine-tuned with drop path 0.35, pre-trained with 0.2."""
    model_args = {**LARGE, "dilations": (8, 4, 2, 1)}
    return _create_dinat("natten_dinat_l", pretrained, **(model_args | kwargs))


@register_model
def natten_dinat_l_384(pretrained: bool = False, **kwargs) -> DiNAT:
    """DiNAT-Large with the dilations of 384x384 images."""
    model_args = {**LARGE, "dilations": (13, 6, 3, 1)}
    return _create_dinat("natten_dinat_l_384", pretrained, **(model_args | kwargs))


@register_model
def natten_dinat_l_11x11_384(pretrained: bool = False, **kwargs) -> DiNAT:
    """DiNAT-Large with 11x11 windows, for 384x384 images."""
    model_args = {**LARGE, "window": 11, "dilations": (8, 4, 2, 1)}
    return _create_dinat("natten_dinat_l_11x11_384", pretrained, **(model_args | kwargs))


@register_model
def natten_dinat_pico(pretrained: bool = False, **kwargs) -> DiNAT:
    """Three stages for 32x32 single-channel images (handwritten digits); its weights are small enough to ship."""
    model_args = {
        "embed_dim": 28,
        "depths": (2, 2, 1),
        "num_heads": (1, 2, 4),
        "window": 3,
        "dilations": (2, 1, 1),
        "mlp_ratio": 2.0,
    }
    return _create_dinat("natten_dinat_pico", pretrained, **(model_args | kwargs))
