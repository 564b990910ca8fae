"""Flowformer for images: four resolutions of flow-attention with twelve heads each (arXiv:2202.06258).

Positions are learnt for the first map at one input size and interpolated at others. Parameter names are those of the
official checkpoint.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ...layers.flow import FlowAttention2d
from ...layers.positions import resize_positions
from ..builder import DIGITS_CFG, Model, register_family
from ..conversion import Conversion, positions
from ..hosts.base import Host, stage_grids
from ..hosts.blocks import Blocks, equally_long
from ..hosts.deit import LayerNorm1e6
from ..hosts.patches import PatchConv
from ..hosts.pvt import add_positions

torch.fx.wrap("add_positions")  # it asks for shapes


class Block(nn.Module):
    """Pre-norm block on `[B, H, W, dim]` with a residual scale of its feed-forward layer alone."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mlp_ratio: float,
        layer_scale: float,
        proj_drop: float,
        drop_path: float,
        norm_layer: Callable[..., nn.Module],
        act_layer: type[nn.Module],
        impl: Any,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.layer_scale = layer_scale
        self.norm1 = norm_layer(dim, **dd)
        self.attn = FlowAttention2d(dim, num_heads=num_heads, proj_drop=proj_drop, impl=impl, **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.gamma = nn.Parameter(torch.empty(dim, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the layer scale to its initial value; submodules have their own `reset_parameters`."""
        nn.init.constant_(self.gamma, self.layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma * self.mlp(self.norm2(x)))


class Flowformer(Host):
    """Flowformer for images of any size.

    Args:
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        img_size: native input size, for which positions are learnt; those of other sizes are interpolated.
        embed_dims, depths: channels and blocks of each stage.
        num_heads: heads in every stage.
        mlp_ratio: hidden over embedding width.
        layer_scale: initial value of the residual scale of feed-forward layers.
        stage_norms: normalise each stage's map by `norm0`, `norm1`, ... instead of the last one by `norm`.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
        norm_layer, act_layer: layers of the blocks.
        impl: implementation of the attention; see `foveal.kernels.ops.linear_attention`.
    """

    stages_name: ClassVar[str] = "blocks"
    first_conv: ClassVar[str] = "patch_embed.0.proj"

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 10, 3),
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-3,
        stage_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = LayerNorm1e6,
        act_layer: type[nn.Module] = nn.GELU,
        impl: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        equally_long(embed_dims=embed_dims, depths=depths)
        dd = {"device": device, "dtype": dtype}
        drop_paths = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))

        def make_block(dim: int) -> Block:
            return Block(
                dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                layer_scale=layer_scale,
                proj_drop=proj_drop_rate,
                drop_path=next(drop_paths),
                norm_layer=norm_layer,
                act_layer=act_layer,
                impl=impl,
                **dd,
            )

        info = [{"num_chs": dim, "reduction": 4 * 2**i, "module": f"blocks.{i}"} for i, dim in enumerate(embed_dims)]
        self._native_grid = stage_grids(to_2tuple(img_size), [4])[0]
        merges = (PatchConv(a, b, 2, **dd) for a, b in pairwise(embed_dims))
        self.patch_embed = nn.ModuleList([PatchConv(in_chans, embed_dims[0], 4, **dd), *merges])
        self.pos_embed = nn.Parameter(torch.empty(1, self._native_grid[0] * self._native_grid[1], embed_dims[0], **dd))
        stages = [[make_block(dim) for _ in range(depth)] for dim, depth in zip(embed_dims, depths, strict=True)]
        self.blocks = nn.Sequential(*(Blocks(*blocks) for blocks in stages))
        self._build_head(
            feature_info=info,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=norm_layer,
            stage_norms=stage_norms,
            dd=dd,
        )
        self.init_weights(needs_reset=False)

    @property
    def position_grids(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the map that positions are learnt for, by name."""
        return {"pos_embed": self._native_grid}

    def _enter(self, index: int, x: Tensor) -> Tensor:
        if index == 0:
            return add_positions(self.patch_embed[0](x), self.pos_embed, self._native_grid)
        return self.patch_embed[index](x.permute(0, 3, 1, 2))

    def _truncate(self, last: int) -> None:
        self.blocks, self.patch_embed = self.blocks[: last + 1], self.patch_embed[: last + 1]

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """As in `Backbone`, and positions from a truncated normal (std 0.02)."""
        super().init_weights(needs_reset)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that order parameters by depth (layer decay, freezing)."""
        fine = [(r"^patch_embed\.(\d+)", (0,)), (r"^blocks\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^pos_embed|^patch_embed\.0", "blocks": r"^(?:blocks|patch_embed)\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make another input size native: positions are interpolated."""
        super().set_input_size(img_size)
        old, self._native_grid = self._native_grid, self._grids(to_2tuple(img_size))[0]
        table = resize_positions(self.pos_embed.detach(), old, self._native_grid)
        self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)


SMALL = {"embed_dims": (32, 64, 128), "depths": (1, 2, 1), "num_heads": 4, "mlp_ratio": 2.0, "layer_scale": 1.0}
MODELS = {
    "flowformer_cv": Model("Flowformer of 19 blocks.", Flowformer, {"depths": (3, 3, 10, 3)}),
    "flowformer_pico": Model(
        "Three stages for 32x32 single-channel images (handwritten digits).", Flowformer, {**SMALL, "img_size": 32}
    ),
    "test_flowformer": Model(
        "Flowformer for tests.", Flowformer, {"embed_dims": (16, 24), "depths": (1, 2), "num_heads": 2}
    ),
}
CONVERSION = Conversion(resize={"pos_embed": positions})
register_family(
    __name__,
    MODELS,
    conversion=CONVERSION,
    cfg={"fixed_input_size": True, "crop_pct": 0.9, "paper_ids": "arXiv:2202.06258"},
    cfgs={"flowformer_pico.untrained": DIGITS_CFG},
    leaves=(FlowAttention2d,),
)
