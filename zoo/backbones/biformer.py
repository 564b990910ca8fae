"""BiFormer: hierarchical transformers on bi-level routing attention (arXiv:2303.08810).

Three layouts: the models of the paper, with convolutional stems, and two in the layout of Swin-T (STL), which differ in
how the weights are stored, in the attention of the last stage and on maps that 7 does not divide. Parameter names are
those of the official checkpoints.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal

from timm.layers import DropPath, LayerNorm, calculate_drop_path_rates, register_notrace_module
from torch import Tensor, nn

from ...kernels.common.calling import Impl
from ...layers.routing import BiLevelRoutingAttention2d, ConvRoutingAttention2d, LePEAttention2d, conv_nhwc, pointwise
from ..builder import Model, register_family
from ..hosts.base import ListedBackbone
from ..hosts.blocks import Blocks, Stage, at_least, equally_long

Layout = Literal["conv", "stl", "stl_nchw"]


class Block(nn.Module):
    """Pre-norm transformer block on `[B, H, W, dim]`; the "conv" layout adds a depthwise convolution in front."""

    def __init__(
        self,
        dim: int,
        *,
        attn: nn.Module,
        layout: Layout,
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
        self.channels_first = layout == "stl_nchw"
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if layout == "conv" else None
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.norm2 = norm_layer(dim, **dd)
        make = partial(pointwise, self.channels_first, **dd)
        hidden = int(dim * mlp_ratio)
        spare = [nn.Identity()] if layout == "conv" else []  # a place that official names count
        self.mlp = nn.Sequential(make(dim, hidden), *spare, act_layer(), make(hidden, dim))
        self.mlp_drop = nn.Dropout(proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + conv_nhwc(self.pos_embed, x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        y = self.norm2(x)
        y = conv_nhwc(self.mlp, y) if self.channels_first else self.mlp(y)
        return x + self.drop_path(self.mlp_drop(y))


class Stem(nn.Sequential):
    """Layers on `[B, C, H, W]` that end in `[B, H, W, C]`."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).permute(0, 2, 3, 1)


class Downsample(nn.Sequential):
    """Layers on `[B, C, H, W]`, applied to `[B, H, W, C]`."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_module
class PatchConv2d(nn.Conv2d):
    """Convolution of whole patches that do not overlap, at least one; `[B, C, H, W]`."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(at_least(self.kernel_size[0], input))


def make_downsampling(layout: Layout, in_chans: int, channels: Sequence[int], *, device=None, dtype=None):
    """Layer before each stage: the stem, then layers that halve the map: "conv" rounds up, the others down."""
    dd = {"device": device, "dtype": dtype}
    pairs = list(pairwise(channels))
    first = channels[0]
    if layout == "conv":
        conv = partial(nn.Conv2d, kernel_size=3, stride=2, padding=1, **dd)
        half = first // 2
        stem = Stem(conv(in_chans, half), nn.BatchNorm2d(half, **dd), nn.GELU(), conv(half, first),
                    nn.BatchNorm2d(first, **dd))  # fmt: skip
        return nn.ModuleList([stem, *(Downsample(conv(a, b), nn.BatchNorm2d(b, **dd)) for a, b in pairs)])
    stem = Stem(PatchConv2d(in_chans, first, 4, stride=4, **dd), nn.BatchNorm2d(first, **dd))
    merges = (Downsample(nn.BatchNorm2d(a, **dd), PatchConv2d(a, b, 2, stride=2, **dd)) for a, b in pairs)
    return nn.ModuleList([stem, *merges])


class BiFormer(ListedBackbone):
    """BiFormer for images of any size.

    Args:
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        layout: "conv" as in the paper; "stl" and "stl_nchw" for the two models in the layout of Swin-T.
        embed_dim: channels of the first stage; every further stage doubles them.
        depths: blocks of each stage.
        regions: regions along each side of every map.
        topks: regions that a region attends to, one number a stage; None for full attention with 8 heads.
        head_dim: channels of a head under routing.
        mlp_ratio: hidden over embedding width.
        stage_norms: normalise each stage's map by `extra_norms.0`, `extra_norms.1`, ... instead of the last one by
            `norm`, as the official detection and segmentation backbones do.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
        norm_layer, act_layer: layers of the blocks.
        impl: implementation of the attention; see `foveal.kernels.ops.routing_attention2d`.
    """

    stage_norm_name: ClassVar[str] = "extra_norms.{}"
    first_conv: ClassVar[str] = "downsample_layers.0.0"

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        layout: Layout = "conv",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 2, 8, 2),
        regions: int = 7,
        topks: Sequence[int | None] = (1, 4, 16, None),
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        stage_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: type[nn.Module] = LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        impl: Impl = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if layout not in ("conv", "stl", "stl_nchw"):
            raise ValueError(f"layout={layout!r} must be 'conv', 'stl' or 'stl_nchw'")
        equally_long(depths=depths, topks=topks)
        dd = {"device": device, "dtype": dtype}

        def make_attn(dim: int, topk: int | None) -> nn.Module:
            nchw = layout == "stl_nchw"
            if topk is None:
                lepe_of = "value" if nchw else "input"
                return LePEAttention2d(dim, lepe_of=lepe_of, conv=nchw, proj_drop=proj_drop_rate, **dd)
            if dim % head_dim:
                raise ValueError(f"head_dim={head_dim} must divide the {dim} channels of every stage with routing")
            routing = ConvRoutingAttention2d if nchw else BiLevelRoutingAttention2d
            options = {"regions": regions, "topk": topk, "proj_drop": proj_drop_rate, "impl": impl}
            return routing(dim, num_heads=dim // head_dim, **options, **dd)

        channels = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for dim, depth, topk in zip(channels, depths, topks, strict=True):
            blocks: list[nn.Module] = [
                Block(
                    dim,
                    attn=make_attn(dim, topk),
                    layout=layout,
                    mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate,
                    drop_path=next(drop_paths),
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    **dd,
                )
                for _ in range(depth)
            ]
            stages.append(Blocks(*blocks) if layout == "conv" else Stage(blocks))
        self.downsample_layers = make_downsampling(layout, in_chans, channels, **dd)
        self.stages = nn.Sequential(*stages)
        if stage_norms:
            self.extra_norms = nn.ModuleList(nn.Identity() for _ in channels)
        self._build_head(
            feature_info=[
                {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(channels)
            ],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=norm_layer,
            stage_norms=stage_norms,
            dd=dd,
        )
        if not stage_norms:
            self.norm = nn.BatchNorm2d(channels[-1], **dd)
        self.init_weights(needs_reset=False)

    def _norm_map(self, index: int, x: Tensor, *, final: bool) -> Tensor:
        if self.stage_norms or not final or index < len(self.feature_info) - 1:
            return super()._norm_map(index, x, final=final)
        return conv_nhwc(self.norm, x)


TINY = {"embed_dim": 64, "depths": (2, 2, 8, 2)}
SMALL = {"embed_dim": 64, "depths": (4, 4, 18, 4)}
BASE = {"embed_dim": 96, "depths": (4, 4, 18, 4)}
STL = {"embed_dim": 96, "depths": (2, 2, 6, 2), "mlp_ratio": 4.0}
TEST = {"embed_dim": 16, "depths": (2, 1), "topks": (4, None), "head_dim": 8}
MODELS = {
    "biformer_t": Model("BiFormer-Tiny.", BiFormer, TINY),
    "biformer_s": Model("BiFormer-Small, trained with drop path 0.15.", BiFormer, SMALL),
    "biformer_b": Model("BiFormer-Base.", BiFormer, BASE),
    "biformer_stl": Model("BiFormer in the layout of Swin-T.", BiFormer, {**STL, "layout": "stl"}),
    "biformer_stl_nchw": Model(
        "BiFormer in the layout of Swin-T, the checkpoint with 1x1 convolutions: other weights, other numbers.",
        BiFormer,
        {**STL, "layout": "stl_nchw"},
    ),
    "test_biformer": Model("BiFormer for tests.", BiFormer, TEST),
    "test_biformer_stl_nchw": Model(
        "BiFormer in the layout of Swin for tests.", BiFormer, {**TEST, "layout": "stl_nchw"}
    ),
}
register_family(
    __name__,
    MODELS,
    cfg={"paper_ids": "arXiv:2303.08810"},
    leaves=(BiLevelRoutingAttention2d, ConvRoutingAttention2d, LePEAttention2d),
)
