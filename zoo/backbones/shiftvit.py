"""ShiftViT: Swin's layout with a shift of channels in the place of attention (arXiv:2201.10801).

Nothing is learnt for a position, so images of any size go through. Parameter names are those of the official
checkpoints.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

from timm.layers import DropPath, GroupNorm1, Mlp, calculate_drop_path_rates
from torch import Tensor, nn

from ...layers.shift import Shift2d
from ..builder import DIGITS_CFG, Model, register_family
from ..hosts.base import Backbone
from ..hosts.patches import CompletedPatchConv2d


class MapNorm(GroupNorm1):
    """Normalises each `[H, W, dim]` map of a batch by its own mean and variance."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Shift, then a residual feed-forward layer, on `[B, H, W, dim]`; the shift has no way around it."""

    def __init__(
        self,
        dim: int,
        *,
        divisions: int,
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        norm_layer: Callable[..., nn.Module],
        act_layer: type[nn.Module],
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.shift = Shift2d(dim, divisions=divisions)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, use_conv=True, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.shift(x)
        y = self.mlp(self.norm2(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path(y)


class PatchEmbed(nn.Module):
    """4x4 patches and a norm: `[B, in_chans, H, W]` to `[B, H / 4, W / 4, dim]`, rounded up."""

    def __init__(self, in_chans: int, dim: int, *, norm_layer: Callable[..., nn.Module], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = CompletedPatchConv2d(in_chans, dim, 4, stride=4, **dd)
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """A norm and a 2x2 convolution: `[B, H, W, dim]` to `[B, H / 2, W / 2, 2 * dim]`, rounded up."""

    def __init__(self, dim: int, *, norm_layer: Callable[..., nn.Module], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = norm_layer(dim, **dd)
        self.reduction = CompletedPatchConv2d(dim, 2 * dim, 2, stride=2, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ShiftViT(Backbone):
    """ShiftViT for images of any size.

    Args:
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        embed_dim: channels of the first stage; every further stage doubles them.
        depths: blocks of each stage.
        divisions: see `foveal.layers.Shift2d`; 4 / divisions of the channels move.
        mlp_ratio: hidden over embedding width.
        stage_norms: normalise each stage's map by `norm0`, `norm1`, ... instead of the last one by `norm`.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
        norm_layer, act_layer: layers of the blocks.
    """

    stages_name: ClassVar[str] = "layers"

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        divisions: int = 12,
        mlp_ratio: float = 4.0,
        stage_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = MapNorm,
        act_layer: type[nn.Module] = nn.GELU,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        channels = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))

        def make_block(dim: int) -> nn.Module:
            return Block(
                dim,
                divisions=divisions,
                mlp_ratio=mlp_ratio,
                proj_drop=proj_drop_rate,
                drop_path=next(drop_paths),
                norm_layer=norm_layer,
                act_layer=act_layer,
                **dd,
            )

        self.patch_embed = PatchEmbed(in_chans, embed_dim, norm_layer=norm_layer, **dd)
        self._build_stages(
            [[make_block(dim) for _ in range(depth)] for dim, depth in zip(channels, depths, strict=True)],
            ways_down=[PatchMerging(dim, norm_layer=norm_layer, **dd) for dim in channels[:-1]],
            channels=channels,
            reductions=[4 * 2**i for i in range(len(depths))],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=norm_layer,
            stage_norms=stage_norms,
            dd=dd,
        )


BASE = {"embed_dim": 128, "divisions": 16}
MODELS = {
    "shiftvit_light_t": Model("ShiftViT-Tiny, light: drop path 0.2.", ShiftViT, {"depths": (2, 2, 6, 2)}),
    "shiftvit_light_s": Model("ShiftViT-Small, light: drop path 0.4.", ShiftViT, {"depths": (2, 2, 18, 2)}),
    "shiftvit_light_b": Model(
        "ShiftViT-Base, light; no weights are published.", ShiftViT, {**BASE, "depths": (2, 2, 18, 2)}
    ),
    "shiftvit_r4_t": Model(
        "ShiftViT-Tiny, MLP ratio 4; no weights are published.", ShiftViT, {"depths": (2, 2, 12, 3)}
    ),
    "shiftvit_r4_s": Model(
        "ShiftViT-Small, MLP ratio 4; no weights are published.", ShiftViT, {"depths": (2, 6, 24, 4)}
    ),
    "shiftvit_r4_b": Model(
        "ShiftViT-Base, MLP ratio 4; no weights are published.", ShiftViT, {**BASE, "depths": (4, 6, 22, 4)}
    ),
    "shiftvit_r2_t": Model(
        "ShiftViT-Tiny, MLP ratio 2: drop path 0.2.", ShiftViT, {"depths": (6, 8, 18, 6), "mlp_ratio": 2.0}
    ),
    "shiftvit_r2_s": Model(
        "ShiftViT-Small, MLP ratio 2: drop path 0.4.", ShiftViT, {"depths": (10, 18, 36, 10), "mlp_ratio": 2.0}
    ),
    "shiftvit_r2_b": Model(
        "ShiftViT-Base, MLP ratio 2; no weights are published.",
        ShiftViT,
        {**BASE, "depths": (10, 18, 36, 10), "mlp_ratio": 2.0},
    ),
    "shiftvit_pico": Model(
        "Three stages for 32x32 single-channel images (handwritten digits).",
        ShiftViT,
        {"embed_dim": 32, "depths": (2, 2, 2), "divisions": 8, "mlp_ratio": 2.0},
    ),
    "test_shiftvit": Model("ShiftViT for tests.", ShiftViT, {"embed_dim": 16, "depths": (1, 2), "divisions": 4}),
}
register_family(
    __name__,
    MODELS,
    cfg={"paper_ids": "arXiv:2201.10801"},
    cfgs={"shiftvit_pico.untrained": DIGITS_CFG},
    leaves=(Shift2d,),
)
