"""sMLPNet: depthwise convolutions, then linear layers along rows and columns of a map (arXiv:2109.05422).

The linear layers are learnt for one input size, which `img_size` chooses.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

from timm.layers import DropPath, Mlp, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ...layers.mixing import SparseMlp2d
from ..builder import DIGITS_CFG, Model, register_family
from ..conversion import Conversion, Target
from ..hosts.base import ListedBackbone, stage_grids
from ..hosts.blocks import Blocks
from ..hosts.patches import PatchConv


class LocalMixing(nn.Module):
    """Batch norm, activation and a depthwise 3x3 convolution of `[B, H, W, dim]`."""

    def __init__(self, dim: int, *, act_layer: type[nn.Module], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.act = act_layer()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.act(self.norm(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Residual mixing of tokens, near and along both axes, then a feed-forward layer; `[B, H, W, dim]`."""

    def __init__(
        self,
        dim: int,
        *,
        grid_size: tuple[int, int],
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        act_layer: type[nn.Module],
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.local = LocalMixing(dim, act_layer=act_layer, **dd)
        self.sparse = SparseMlp2d(dim, grid_size=grid_size, act_layer=act_layer, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.sparse(self.local(x)))
        return x + self.drop_path(self.mlp(self.norm(x)))


class MapBatchNorm(nn.BatchNorm2d):
    """Batch norm of `[B, H, W, dim]`."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class sMLPNet(ListedBackbone):
    """sMLPNet for images of one size.

    Args:
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        img_size: the input size.
        embed_dim: channels of the first stage; every further stage doubles them.
        depths: blocks of each stage.
        mlp_ratio: hidden over embedding width.
        stage_norms: normalise each stage's map by `norm0`, `norm1`, ... instead of the last one by `norm`.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
        act_layer: activation.
    """

    first_conv: ClassVar[str] = "downsample_layers.0.proj"

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dim: int = 80,
        depths: Sequence[int] = (2, 8, 14, 2),
        mlp_ratio: float = 3.0,
        stage_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.depths = tuple(depths)
        channels = [embed_dim * 2**i for i in range(len(depths))]
        reductions = [4 * 2**i for i in range(len(depths))]
        grids = stage_grids(to_2tuple(img_size), reductions)
        drop_paths = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))

        def make_block(stage: int) -> nn.Module:
            return Block(
                channels[stage],
                grid_size=grids[stage],
                mlp_ratio=mlp_ratio,
                proj_drop=proj_drop_rate,
                drop_path=next(drop_paths),
                act_layer=act_layer,
                **dd,
            )

        stem = PatchConv(in_chans, embed_dim, 4, bias=False, **dd)
        merges = (PatchConv(a, b, 2, bias=False, nhwc=True, **dd) for a, b in pairwise(channels))
        self.downsample_layers = nn.ModuleList([stem, *merges])
        self.stages = nn.Sequential(*(Blocks(*(make_block(i) for _ in range(n))) for i, n in enumerate(depths)))
        self._build_head(
            feature_info=[
                {"num_chs": dim, "reduction": reductions[i], "module": f"stages.{i}"} for i, dim in enumerate(channels)
            ],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=MapBatchNorm,
            stage_norms=stage_norms,
            dd=dd,
        )
        self.init_weights(needs_reset=False)


def official_names(model: nn.Module) -> list:
    """Renames of the official files, which count blocks over all stages."""
    depths: tuple[int, ...] = model.depths  # pyright: ignore[reportAssignmentType]
    blocks = [f"stages.{stage}.{block}." for stage, depth in enumerate(depths) for block in range(depth)]
    parts = {
        r"token_mix\.(\d+)\.0\.conv_merge\.BN\.": "local.norm.",
        r"token_mix\.(\d+)\.0\.conv_merge\.Conv\.": "local.conv.",
        r"token_mix\.(\d+)\.1\.BN\.": "sparse.norm.",
        r"token_mix\.(\d+)\.1\.proj_h\.": "sparse.along_rows.",
        r"token_mix\.(\d+)\.1\.proh_w\.": "sparse.along_columns.",
        r"token_mix\.(\d+)\.1\.": "sparse.",
        r"channel_mix\.(\d+)\.1\.": "norm.",
        r"channel_mix\.(\d+)\.2\.net\.0\.": "mlp.fc1.",
        r"channel_mix\.(\d+)\.2\.net\.3\.": "mlp.fc2.",
    }
    named = [(f"^{old}", lambda match, new=new: blocks[int(match[1])] + new) for old, new in parts.items()]
    ends = [(r"^batch_norm\.", "norm."), (r"^mlp_head\.0\.", "head.")]
    return [*named, *ends, (r"^to_patch_embedding\.(\d+)\.0\.", r"downsample_layers.\1.proj.")]


def flat(value: Tensor, target: Target) -> Tensor:
    """A 1x1 convolution as a linear layer."""
    return value.flatten(1)


DEEP = (2, 10, 24, 2)
MODELS = {
    "smlpnet_t": Model("sMLPNet-Tiny.", sMLPNet, {"embed_dim": 80, "depths": (2, 8, 14, 2)}),
    "smlpnet_s": Model("sMLPNet-Small, trained with drop path 0.2.", sMLPNet, {"embed_dim": 96, "depths": DEEP}),
    "smlpnet_b": Model("sMLPNet-Base, trained with drop path 0.3.", sMLPNet, {"embed_dim": 112, "depths": DEEP}),
    "smlpnet_pico": Model(
        "Three stages for 32x32 single-channel images (handwritten digits).",
        sMLPNet,
        {"img_size": 32, "embed_dim": 32, "depths": (1, 2, 1), "mlp_ratio": 2.0},
    ),
    "test_smlpnet": Model("sMLPNet for tests.", sMLPNet, {"img_size": 64, "embed_dim": 16, "depths": (1, 2)}),
}
CONVERSION = Conversion(rename=official_names, resize={"weight": flat})
register_family(
    __name__,
    MODELS,
    conversion=CONVERSION,
    cfg={"fixed_input_size": True, "paper_ids": "arXiv:2109.05422"},
    cfgs={"smlpnet_pico.untrained": DIGITS_CFG},
    leaves=(SparseMlp2d, MapBatchNorm),
)
