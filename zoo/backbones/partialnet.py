"""PartialNet: FasterNet whose untouched channels get a gate, or attention in the last stage (arXiv:2502.01303).

Images of any size go through. No weights are published; the models are those of the authors' configuration files, whose
names of parameters load.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from ...layers.partial import DistanceAttention2d, PartialAttention2d, PlaceGate2d, StyleGate2d
from ..builder import DIGITS_CFG, Model, register_family
from ..conversion import Conversion, Target
from ..hosts.base import WideHeadBackbone
from ..hosts.patches import CompletedPatchConv2d


class Block(nn.Module):
    """Partial attention, then a residual feed-forward layer, on `[B, H, W, dim]`; attention is residual, too."""

    def __init__(
        self,
        dim: int,
        *,
        mixing: PartialAttention2d,
        mlp_ratio: float,
        gate_places: bool,
        drop_path: float,
        act_layer: type[nn.Module],
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(dim * mlp_ratio)
        self.spatial_mixing = mixing
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False, **dd),
            nn.BatchNorm2d(hidden, **dd),
            act_layer(),
            nn.Conv2d(hidden, dim, 1, bias=False, **dd),
        )
        if gate_places:
            self.mlp.append(PlaceGate2d(dim, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.spatial_mixing(x)
        if self.spatial_mixing.kind == "attn":
            x = y = x + y
        return x + self.drop_path(self.mlp(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchConv(nn.Module):
    """Convolution of whole patches of `[B, C, H, W]` and batch norm: `[B, H / side, W / side, dim]`, rounded up."""

    def __init__(self, in_chans: int, dim: int, side: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = CompletedPatchConv2d(in_chans, dim, side, stride=side, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x)).permute(0, 2, 3, 1)


class Downsample(PatchConv):
    """The same of maps `[B, H, W, dim]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2))


class PartialNet(WideHeadBackbone):
    """PartialNet for images of any size.

    Args:
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax" or "" (none).
        embed_dim, depths: channels of the first stage, of which every further one has twice as many; blocks by stage.
        num_heads: heads of the attention in the last stage.
        mlp_ratio: hidden over embedding width.
        gate_places: whether feed-forward layers end in a gate of each token.
        feature_dim: channels of the layer between pooling and head.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in attention, stochastic depth (its rate
            grows linearly to this value). The authors drop 0.1 in attention.
        act_layer: activation.
    """

    stages_name: ClassVar[str] = "stages"
    pooled_first: ClassVar[bool] = True

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 2, 6, 4),
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        gate_places: bool = False,
        feature_dim: int = 1280,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: type[nn.Module] = nn.ReLU,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        channels = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))

        def make_block(dim: int) -> Block:
            kind = "attn" if dim == channels[-1] else "gate"
            mixing = PartialAttention2d(dim, kind=kind, num_heads=num_heads, proj_drop=proj_drop_rate, **dd)
            options = {"mlp_ratio": mlp_ratio, "gate_places": gate_places, "act_layer": act_layer}
            return Block(dim, mixing=mixing, drop_path=next(drop_paths), **options, **dd)

        self.feature_dim, self.act_layer = feature_dim, act_layer
        self.patch_embed = PatchConv(in_chans, embed_dim, 4, **dd)
        self.pre_head = nn.Identity()
        self._build_stages(
            [[make_block(dim) for _ in range(depth)] for dim, depth in zip(channels, depths, strict=True)],
            ways_down=[Downsample(dim, 2 * dim, 2, **dd) for dim in channels[:-1]],
            channels=channels,
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
        width = nn.Linear(self.num_features, self.feature_dim, bias=False, device=device, dtype=dtype)
        return nn.Sequential(width, self.act_layer())


def official_names(model: nn.Module) -> list:
    """Renames of the official files, which number ways down among the stages."""
    return [
        (r"^stages\.(\d+)\.blocks\.", lambda match: f"stages.{int(match[1]) // 2}.blocks."),
        (r"^stages\.(\d+)\.reduction\.", lambda match: f"stages.{int(match[1]) // 2}.downsample.proj."),
        (r"^stages\.(\d+)\.norm\.", lambda match: f"stages.{int(match[1]) // 2}.downsample.norm."),
        (r"^avgpool_pre_head\.1\.", "pre_head.0."),
    ]


def flat(value: Tensor, target: Target) -> Tensor:
    """A 1x1 convolution as a linear layer."""
    return value.flatten(1)


UNPUBLISHED = "no weights are published."
GELU = {"act_layer": nn.GELU, "depths": (1, 2, 8, 2)}
MODELS = {
    "partialnet_t0": Model(f"PartialNet-T0; {UNPUBLISHED}", PartialNet, {**GELU, "embed_dim": 32}),
    "partialnet_t1": Model(f"PartialNet-T1; {UNPUBLISHED}", PartialNet, {**GELU, "embed_dim": 48, "gate_places": True}),
    "partialnet_t2": Model(f"PartialNet-T2; {UNPUBLISHED}", PartialNet, {"embed_dim": 64, "depths": (2, 2, 6, 4)}),
    "partialnet_s": Model(f"PartialNet-S; {UNPUBLISHED}", PartialNet, {"embed_dim": 96, "depths": (2, 2, 9, 4)}),
    "partialnet_m": Model(f"PartialNet-M; {UNPUBLISHED}", PartialNet, {"embed_dim": 128, "depths": (2, 3, 16, 4)}),
    "partialnet_l": Model(f"PartialNet-L; {UNPUBLISHED}", PartialNet, {"embed_dim": 160, "depths": (2, 3, 20, 4)}),
    "partialnet_pico": Model(
        "Three stages for 32x32 single-channel images (handwritten digits).",
        PartialNet,
        {"embed_dim": 32, "depths": (1, 2, 1), "feature_dim": 128, "act_layer": nn.GELU},
    ),
    "test_partialnet": Model(
        "PartialNet for tests.",
        PartialNet,
        {"embed_dim": 16, "depths": (1, 2), "feature_dim": 24, "gate_places": True},
    ),
}
CONVERSION = Conversion(rename=official_names, resize={"weight": flat})
register_family(
    __name__,
    MODELS,
    conversion=CONVERSION,
    cfg={"crop_pct": 0.9, "paper_ids": "arXiv:2502.01303"},
    cfgs={"partialnet_pico.untrained": DIGITS_CFG},
    leaves=(PartialAttention2d, DistanceAttention2d, StyleGate2d, PlaceGate2d),
)
