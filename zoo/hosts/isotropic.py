"""One resolution throughout, like ViT, without a class token: the layout of isotropic NAT (arXiv:2209.15001)."""

from typing import Any, ClassVar, Literal

import torch
from timm.layers import PatchEmbed, register_notrace_module, to_2tuple
from timm.models import checkpoint
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from ...layers.positions import resize_positions
from ...layers.relative import RelativeAttention2d
from .base import Host, check_weight_init, stage_grids
from .blocks import AttentionFactory, Block, Layout, Place, per_block
from .patches import CompletedPatchEmbed
from .pvt import add_positions

torch.fx.wrap("add_positions")  # it asks for shapes
register_notrace_module(RelativeAttention2d)  # torch.fx cannot trace its check of the grid


class Isotropic(Host):
    """Blocks at one resolution around any attention on maps `[B, H, W, dim]`.

    With `attn` it takes images of any size, zero-padded right and bottom to a multiple of `patch_size`. Without it is
    ViT-rpb: dense attention with a bias per offset, whose table fixes the input size.

    Args:
        attn: makes the attention of a block; see `foveal.zoo.hosts.Place`. Not the host's own in some blocks only.
        in_chans, num_classes, global_pool, drop_rate, norm_layer, act_layer, impl: as in `Swin`.
        img_size: native input size, from which the bias tables of ViT-rpb follow; `set_input_size` changes it.
        patch_size: side of the patches.
        embed_dim, depth, num_heads, mlp_ratio: channels, blocks, heads, hidden over embedding width.
        window: side of windows, handed on to `attn`.
        positions: add a learned embedding of positions to the patches. An attention that does not know where its tokens
            are needs it: without it the model sees a bag of patches.
        weight_init: "" as in `Backbone`; "jax" for widths of the order of 64, whose blocks add next to nothing under a
            standard deviation of 0.02: Xavier's uniform distribution, LeCun's for the patches, a head of zeros.
        proj_drop_rate, drop_path_rate: dropout in blocks, stochastic depth.
        attn_options: further arguments of `attn`; a list or tuple has one entry per block.
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
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        window: int = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        positions: bool = False,
        weight_init: Literal["", "jax"] = "",
        impl: str = "auto",
        device=None,
        dtype=None,
        **attn_options: Any,
    ):
        super().__init__()
        check_weight_init(weight_init)
        dd = {"device": device, "dtype": dtype}
        self.weight_init = weight_init
        self.dense, self.grad_checkpointing = attn is None, False
        self.patch_embed = (PatchEmbed if self.dense else CompletedPatchEmbed)(
            img_size=to_2tuple(img_size) if self.dense else None,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            norm_layer=norm_layer,
            output_fmt="NHWC",
            strict_img_size=self.dense,
            dynamic_img_pad=not self.dense,
            **dd,
        )

        def own_attention(place: Place) -> nn.Module:
            shared = {key: value for key, value in place.options.items() if key != "impl"}
            return RelativeAttention2d(place.dim, num_heads=place.num_heads, grid_size=place.grid, **shared)

        def make_block(place: Place, **parts) -> Block:
            return Block(
                place.dim,
                mlp_ratio=mlp_ratio,
                proj_drop=proj_drop_rate,
                norm_layer=norm_layer,
                act_layer=act_layer,
                **parts,
                **dd,
            )

        layout = Layout(
            attn=attn,
            attn_options=per_block(attn_options),
            own=own_attention,
            block=make_block,
            channels=[embed_dim],
            depths=[depth],
            num_heads=[num_heads],
            grids=[self.patch_embed.grid_size or stage_grids(to_2tuple(img_size), [patch_size])[0]],
            windows=[window],
            drop_path_rate=drop_path_rate,
            options={"proj_drop": proj_drop_rate, "impl": impl, **dd},
        )
        self._native_grid = layout.grids[0]
        rows, columns = self._native_grid
        self.pos_embed = nn.Parameter(torch.empty(1, rows * columns, embed_dim, **dd)) if positions else None
        self.layers = nn.Sequential(*layout.blocks(0))
        self._build_head(
            feature_info=[
                {"num_chs": embed_dim, "reduction": patch_size, "module": f"layers.{i}"} for i in range(depth)
            ],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=norm_layer,
            stage_norms=False,
            dd=dd,
        )
        self.init_weights(needs_reset=False)

    def _enter(self, index: int, x: Tensor) -> Tensor:
        if index:
            return x
        x = self.patch_embed(x)
        return x if self.pos_embed is None else add_positions(x, self.pos_embed, self._native_grid)

    def _run(self, index: int, x: Tensor) -> Tensor:
        return checkpoint(self.layers[index], x) if self.grad_checkpointing else self.layers[index](x)

    def _truncate(self, last: int) -> None:
        self.layers = self.layers[: last + 1]

    @property
    def position_grids(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the map that the embedding of positions is learnt for, by its name; empty without one."""
        return {} if self.pos_embed is None else {"pos_embed": self._native_grid}

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """As in `Backbone` or `weight_init`; the embedding of positions from a truncated normal (std dim ** -0.5)."""
        super().init_weights(needs_reset)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=self.pos_embed.shape[-1] ** -0.5)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that order parameters by depth (layer decay, freezing)."""
        return {"stem": r"^(?:patch|pos)_embed", "blocks": [(r"^layers\.(\d+)", None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make another input size native: what is learnt for one, such as dense bias tables, is interpolated.

        Raises:
            ValueError: the attention is dense and img_size is no multiple of the patch size.
        """
        size = to_2tuple(img_size)
        if self.dense:
            if any(side % self.patch_embed.patch_size[0] for side in size):
                raise ValueError(f"img_size={size} must be a multiple of the patch size {self.patch_embed.patch_size}")
            self.patch_embed.set_input_size(img_size=size)
            for block in self.layers:
                block.attn.set_grid_size(self.patch_embed.grid_size)
            update_model_input_size(self, size)
        else:
            super().set_input_size(size)
        (new,) = stage_grids(size, [self.patch_embed.patch_size[0]])
        if self.pos_embed is not None:
            resized = resize_positions(self.pos_embed.detach(), self._native_grid, new)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        self._native_grid = new
