"""PPMA: four resolutions of attention that fades along rows and columns as the tokens choose (arXiv:2506.15940).

The layout is that of RMT (arXiv:2309.11523): a convolutional stem, and in every block a position encoding, attention
and a feed-forward layer, with depthwise convolutions in all of them. Nothing is learnt for a position, so images of any
size go through. Parameter names are those of the official checkpoints.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from timm.layers import BatchNormAct2d, DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from ...layers.polyline import Form, MapConv, PolylinePathAttention2d
from ...layers.routing import conv_nhwc
from ..builder import DIGITS_CFG, Model, register_family
from ..conversion import Conversion
from ..hosts.base import WideHeadBackbone
from ..hosts.blocks import equally_long


class FeedForward(nn.Module):
    """Feed-forward layer with a residual depthwise convolution after the activation, on `[B, H, W, dim]`."""

    def __init__(self, dim: int, hidden: int, *, drop: float, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.act = nn.GELU()
        self.dwconv = MapConv(hidden, 3, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x + self.dwconv(x)))


class Block(nn.Module):
    """Position encoding, attention and feed-forward layer, all residual; `[B, H, W, dim]`."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        form: Form,
        mlp_ratio: float,
        layer_scale: float | None,
        proj_drop: float,
        drop_path: float,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layer_scale = layer_scale
        self.gamma_1 = None if layer_scale is None else nn.Parameter(torch.empty(1, 1, 1, dim, **dd))
        self.gamma_2 = None if layer_scale is None else nn.Parameter(torch.empty(1, 1, 1, dim, **dd))
        self.pos = MapConv(dim, 3, **dd)
        self.retention_layer_norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.retention = PolylinePathAttention2d(dim, num_heads=num_heads, form=form, proj_drop=proj_drop, **dd)
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.ffn = FeedForward(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the layer scales to their initial value; submodules have their own `reset_parameters`."""
        if self.gamma_1 is not None and self.gamma_2 is not None and self.layer_scale is not None:
            nn.init.constant_(self.gamma_1, self.layer_scale)
            nn.init.constant_(self.gamma_2, self.layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos(x)
        y = self.retention(self.retention_layer_norm(x))
        x = x + self.drop_path(y if self.gamma_1 is None else self.gamma_1 * y)
        y = self.ffn(self.final_layer_norm(x))
        return x + self.drop_path(y if self.gamma_2 is None else self.gamma_2 * y)


class Stem(nn.Module):
    """Four 3x3 convolutions with batch norms: `[B, C, H, W]` to `[B, H / 4, W / 4, dim]`, rounded up."""

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = []
        for a, b, stride in ((in_chans, dim // 2, 2), (dim // 2, dim // 2, 1), (dim // 2, dim, 2), (dim, dim, 1)):
            layers += [nn.Conv2d(a, b, 3, stride=stride, padding=1, **dd), nn.BatchNorm2d(b, **dd), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """A 3x3 convolution with batch norm: `[B, H, W, dim]` to `[B, H / 2, W / 2, out]`, rounded up."""

    def __init__(self, dim: int, out: int, *, device=None, dtype=None):
        super().__init__()
        self.reduction = nn.Conv2d(dim, out, 3, stride=2, padding=1, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(out, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class MapNormAct(BatchNormAct2d):
    """Batch norm and activation of `[B, H, W, dim]`."""

    def forward(self, x: Tensor) -> Tensor:
        return conv_nhwc(super().forward, x)  # pyright: ignore[reportArgumentType]


class PPMA(WideHeadBackbone):
    """PPMA for images of any size.

    Args:
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax" or "" (none).
        embed_dims, depths, num_heads, mlp_ratios, forms: channels, blocks, heads, hidden over embedding width and form
            of the attention of each stage; see `foveal.layers.PolylinePathAttention2d`.
        layer_scales: initial value of the residual scales of each stage; none where None.
        feature_dim: channels of the layer before the head.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
    """

    stages_name: ClassVar[str] = "layers"
    first_conv: ClassVar[str] = "patch_embed.proj.0"

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        forms: Sequence[Form] = ("criss_cross", "criss_cross", "whole", "whole"),
        layer_scales: Sequence[float | None] = (None, None, None, None),
        feature_dim: int = 1024,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        per_stage = {"depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios, "forms": forms}
        equally_long(embed_dims=embed_dims, layer_scales=layer_scales, **per_stage)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drop_paths = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        shared: dict[str, Any] = {"proj_drop": proj_drop_rate, **dd}
        rows = zip(num_heads, forms, mlp_ratios, layer_scales, strict=True)
        options = [dict(zip(("num_heads", "form", "mlp_ratio", "layer_scale"), row, strict=True)) for row in rows]
        stages = [
            [Block(dim, drop_path=next(drop_paths), **given, **shared) for _ in range(depth)]
            for dim, depth, given in zip(embed_dims, depths, options, strict=True)
        ]
        self.feature_dim, self.pre_head = feature_dim, nn.Identity()
        self.patch_embed = Stem(in_chans, embed_dims[0], **dd)
        self._build_stages(
            stages,
            ways_down=[Downsample(a, b, **dd) for a, b in pairwise(embed_dims)],
            channels=embed_dims,
            reductions=[4 * 2**i for i in range(len(depths))],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=nn.Identity,
            stage_norms=False,
            dd=dd,
        )
        self.norm = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        self.init_weights(needs_reset=False)

    def _make_pre_head(self, device: torch.device | None, dtype: torch.dtype | None) -> nn.Module:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        width = nn.Linear(self.num_features, self.feature_dim, **dd)
        return nn.Sequential(OrderedDict(proj=width, norm=MapNormAct(self.feature_dim, act_layer=nn.SiLU, **dd)))


LATE: tuple[Form, ...] = ("criss_cross", "criss_cross", "criss_cross", "whole")
SMALL = {"depths": (3, 4, 18, 4), "mlp_ratios": (4, 4, 3, 3), "forms": LATE}
BASE = {
    "embed_dims": (80, 160, 320, 512), "depths": (4, 8, 25, 8), "num_heads": (5, 5, 10, 16), "mlp_ratios": (4, 4, 3, 3),
    "forms": LATE, "layer_scales": (None, None, 1e-6, 1e-6),
}  # fmt: skip
TINY_STAGES = {"num_heads": (2, 2), "mlp_ratios": (2, 2), "forms": LATE[-2:], "layer_scales": (None, 1.0)}
PICO = {
    "embed_dims": (24, 48, 96), "depths": (1, 2, 1), "num_heads": (2, 2, 4), "mlp_ratios": (2, 2, 2),
    "forms": LATE[-3:], "layer_scales": (None, None, 1.0), "feature_dim": 128,
}  # fmt: skip
MODELS = {
    "ppma_t": Model("PPMA-Tiny.", PPMA, {"depths": (2, 2, 8, 2)}),
    "ppma_s": Model("PPMA-Small.", PPMA, SMALL),
    "ppma_b": Model("PPMA-Base; residual scales begin at 1e-6, as in RMT, whose layout this is.", PPMA, BASE),
    "ppma_pico": Model("Three stages for 32x32 single-channel images (handwritten digits).", PPMA, PICO),
    "test_ppma": Model(
        "PPMA for tests.", PPMA, {**TINY_STAGES, "embed_dims": (16, 24), "depths": (1, 2), "feature_dim": 32}
    ),
}
CONVERSION = Conversion(rename=((r"^(proj|norm)\.", r"pre_head.\1."),), drop=(r"\.Relpos\.angle$",))
register_family(
    __name__,
    MODELS,
    conversion=CONVERSION,
    cfg={"crop_pct": 0.9, "paper_ids": "arXiv:2506.15940"},
    cfgs={"ppma_pico.untrained": DIGITS_CFG},
    leaves=(PolylinePathAttention2d,),
)
