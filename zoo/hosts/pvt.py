"""The layouts of PVT (arXiv:2102.12122) and PVT v2 (arXiv:2106.13797): each stage embeds its own patches.

PVT adds positions to every map. PVT v2 has overlapping patches, a convolution in each feed-forward layer and a norm
after each stage instead.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import Mlp, register_notrace_function, to_2tuple
from timm.models.pvt_v2 import OverlapPatchEmbed
from torch import Tensor, nn

from ...layers.positions import resize_positions
from .base import NumberedHost, stage_grids
from .blocks import AttentionFactory, Block, Blocks, ConvFeedForward, Layout, Place, equally_long
from .patches import CompletedPatchEmbed

torch.fx.wrap("add_positions")  # it asks for shapes
LayerNorm1e6 = partial(nn.LayerNorm, eps=1e-6)


@register_notrace_function
def add_positions(x: Tensor, table: Tensor, grid_size: Sequence[int]) -> Tensor:
    """Position embedding `[1, H * W, C]`, learnt for maps of `grid_size`, on maps `[B, H, W, C]` of any size."""
    size = x.shape[1:3]
    return x + resize_positions(table, grid_size, size).unflatten(1, size)


class PVT(NumberedHost):
    """PVT's layout around any attention on maps `[B, H, W, dim]`, for images of any size.

    The head takes the mean of the last map; there is no class token and no norm before it. Sides that patches do not
    divide are zero-padded right and bottom.

    Args:
        attn: makes the attention of every block; see `foveal.zoo.hosts.Place`. The host has none of its own.
        in_chans, num_classes, global_pool, drop_rate, act_layer, impl: as in `Swin`.
        img_size: native input size, for which position embeddings are learnt; images of other sizes go through with
            interpolated ones.
        embed_dims, depths, num_heads, mlp_ratios: channels, blocks, heads and hidden over embedding width by stage.
        stage_norms: normalise each stage's map by `norm0`, `norm1`, ...; otherwise no map is normalised.
        proj_drop_rate, drop_path_rate: dropout in blocks, stochastic depth.
        norm_layer: layer of the blocks.
        attn_options: further arguments of `attn`; a list or tuple has one entry per stage.
    """

    stages_name: ClassVar[str] = "block{}"
    map_name: ClassVar[str] = "block{}"  # the module that hands out a stage's map
    attached_names: ClassVar[tuple[str, ...]] = ("patch_embed{}", "pos_embed{}")
    first_conv: ClassVar[str] = "patch_embed1.proj"
    mlp_layer: ClassVar[Callable[..., nn.Module]] = Mlp

    def __init__(
        self,
        *,
        attn: AttentionFactory,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
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
        equally_long(embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios)
        reductions = [4 * 2**i for i in range(len(depths))]
        self._native_grids = stage_grids(to_2tuple(img_size), reductions)

        def make_block(place: Place, **parts) -> Block:
            return Block(
                place.dim,
                mlp_ratio=mlp_ratios[place.stage],
                mlp_layer=self.mlp_layer,
                proj_drop=proj_drop_rate,
                norm_layer=norm_layer,
                act_layer=act_layer,
                **parts,
                **dd,
            )

        layout = Layout(
            attn=attn,
            attn_options=attn_options,
            block=make_block,
            channels=embed_dims,
            depths=depths,
            num_heads=num_heads,
            grids=self._native_grids,
            drop_path_rate=drop_path_rate,
            options={"proj_drop": proj_drop_rate, "impl": impl, **dd},
        )
        for i, dim in enumerate(embed_dims):
            self.add_module(f"patch_embed{i + 1}", self._make_embed(i, embed_dims[i - 1] if i else in_chans, dim, **dd))
            self.add_module(f"block{i + 1}", Blocks(*layout.blocks(i)))
            self._add_extras(i, dim, norm_layer=norm_layer, **dd)
        self._build_head(
            feature_info=[
                {"num_chs": dim, "reduction": reduction, "module": self.map_name.format(i)}
                for i, (dim, reduction) in enumerate(zip(embed_dims, reductions, strict=True), 1)
            ],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=norm_layer,
            stage_norms=stage_norms,
            dd=dd,
        )
        self.norm = nn.Identity()
        self.init_weights(needs_reset=False)

    def _make_embed(self, index: int, in_chans: int, dim: int, **dd) -> nn.Module:
        """Layer from `[B, in_chans, H, W]` to the map of stage `index`."""
        return CompletedPatchEmbed(
            img_size=None,
            patch_size=2 if index else 4,
            in_chans=in_chans,
            embed_dim=dim,
            norm_layer=nn.LayerNorm,
            output_fmt="NHWC",
            dynamic_img_pad=True,
            **dd,
        )

    def _add_extras(self, index: int, dim: int, *, norm_layer: Callable[..., nn.Module], **dd) -> None:
        """Parameters of stage `index` beside patches and blocks."""
        rows, columns = self._native_grids[index]
        self.register_parameter(f"pos_embed{index + 1}", nn.Parameter(torch.empty(1, rows * columns, dim, **dd)))

    def _enter(self, index: int, x: Tensor) -> Tensor:
        x = self.get_submodule(f"patch_embed{index + 1}")(x if index == 0 else x.permute(0, 3, 1, 2))
        return add_positions(x, getattr(self, f"pos_embed{index + 1}"), self._native_grids[index])

    def _truncate(self, last: int) -> None:
        super()._truncate(last)
        self._native_grids = self._native_grids[: last + 1]

    @property
    def position_grids(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the maps that position embeddings are learnt for, by name."""
        return {f"pos_embed{i}": grid for i, grid in enumerate(self._native_grids, 1)}

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """As in `Backbone`, and position embeddings from a truncated normal (std 0.02)."""
        super().init_weights(needs_reset)
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("pos_embed"):
                nn.init.trunc_normal_(parameter, std=0.02)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that order parameters by depth (layer decay, freezing)."""
        fine = [(r"^block(\d+)\.(\d+)", None), (r"^(?:patch|pos)_embed(\d+)", (0,)), (r"^norm", (99999,))]
        return {
            "stem": r"^(?:patch|pos)_embed1",
            "blocks": r"^(?:block|patch_embed|pos_embed)(\d+)" if coarse else fine,
        }

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make another input size native: position embeddings and what attentions learnt for one are interpolated."""
        super().set_input_size(img_size)
        grids = self._grids(to_2tuple(img_size))
        for i, (name, old) in enumerate(self.position_grids.items()):
            table = self.get_parameter(name)
            resized = resize_positions(table.detach(), old, grids[i])
            self.register_parameter(name, nn.Parameter(resized, requires_grad=table.requires_grad))
        self._native_grids = grids


class PVTv2(PVT):
    """PVT v2's layout around any attention on maps `[B, H, W, dim]`, for images of any size; arguments as in `PVT`.

    Every map is normalised, by `norm1`, `norm2`, ..., and `stage_norms` must be off.
    """

    map_name: ClassVar[str] = "norm{}"
    attached_names: ClassVar[tuple[str, ...]] = ("patch_embed{}", "norm{}")
    mlp_layer: ClassVar[Callable[..., nn.Module]] = ConvFeedForward

    def __init__(self, *, stage_norms: bool = False, **arguments: Any):
        if stage_norms:
            raise ValueError("stage_norms=True must be False: the maps of PVT v2 are normalised as they are")
        super().__init__(**arguments)

    def _make_embed(self, index: int, in_chans: int, dim: int, **dd) -> nn.Module:
        return OverlapPatchEmbed(3 if index else 7, 2 if index else 4, in_chans, dim, **dd)

    def _add_extras(self, index: int, dim: int, *, norm_layer: Callable[..., nn.Module], **dd) -> None:
        self.add_module(f"norm{index + 1}", norm_layer(dim, **dd))

    def _enter(self, index: int, x: Tensor) -> Tensor:
        return self.get_submodule(f"patch_embed{index + 1}")(x if index == 0 else x.permute(0, 3, 1, 2))

    def _run(self, index: int, x: Tensor) -> Tensor:
        return self.get_submodule(f"norm{index + 1}")(super()._run(index, x))

    @property
    def position_grids(self) -> dict[str, tuple[int, int]]:
        """None: there are no position embeddings."""
        return {}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that order parameters by depth (layer decay, freezing)."""
        fine = [(r"^block(\d+)\.(\d+)", None), (r"^patch_embed(\d+)", (0,)), (r"^norm(\d+)", (99999,))]
        return {"stem": r"^patch_embed1", "blocks": r"^(?:block|patch_embed|norm)(\d+)" if coarse else fine}
