"""DeiT's layout, timm's `VisionTransformer`, with blocks that know the grid of their tokens (arXiv:2012.12877)."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from timm.layers import Mlp, register_notrace_function, to_2tuple
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ...layers.positions import resize_positions
from .base import check_weight_init, position_tables, set_grid_size
from .blocks import AttentionFactory, Layout, per_block
from .patches import CompletedPatchEmbed

LayerNorm1e6 = partial(nn.LayerNorm, eps=1e-6)
register_notrace_function(resize_positions)  # torch.fx cannot trace its check of sizes


class GridBlock(Block):
    """timm's block around its own attention, or one that takes the grid of its tokens.

    Tokens are `[B, 1 + H * W, dim]`, class token first.
    """

    takes_grid = False

    def forward(self, x: Tensor, grid_size: tuple[int, int]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = self.norm1(x)
        x = x + self.drop_path1(self.attn(y, grid_size=grid_size) if self.takes_grid else self.attn(y))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class DeiT(VisionTransformer):
    """DeiT's layout around any attention on tokens `[B, 1 + H * W, dim]`, class token first, for images of any size.

    Sides that patches do not divide are zero-padded right and bottom. Parameters are named as in the official
    checkpoints. Without `attn` it is DeiT itself.

    Args:
        attn: makes the attention of a block, called as `attention(tokens, grid_size=(H, W))`; see
            `foveal.zoo.hosts.Place`. The host's own is timm's.
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "token", "avg", "max", "avgmax" or "" (none).
        img_size: native input size, for which the position embedding is learnt; images of other sizes go through with
            an interpolated one.
        patch_size: side of the patches.
        embed_dim, depth, num_heads: channels, blocks, heads.
        mlp_ratio: hidden over embedding width.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
        norm_layer, act_layer, mlp_layer: layers of the blocks.
        weight_init: "" or "jax", as in `Isotropic`.
        impl: implementation of the attention, "auto", "triton", "torch" or "reference".
        attn_options: further arguments of `attn`; a list or tuple has one entry per block.
    """

    first_conv: ClassVar[str] = "patch_embed.proj"
    output_fmt: Literal["NLC"] = "NLC"

    def __init__(
        self,
        *,
        attn: AttentionFactory | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "avgmax", "max", "token"] = "token",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = LayerNorm1e6,
        act_layer: type[nn.Module] = nn.GELU,
        mlp_layer: type[nn.Module] = Mlp,
        weight_init: Literal["", "jax"] = "",
        impl: str = "auto",
        device=None,
        dtype=None,
        **attn_options: Any,
    ):
        check_weight_init(weight_init)
        size: tuple[int, int] = to_2tuple(img_size)
        rows, columns = size
        layout = Layout(
            attn=attn,
            attn_options=per_block(attn_options),
            channels=[embed_dim],
            depths=[depth],
            num_heads=[num_heads],
            grids=[(rows // patch_size, columns // patch_size)],
            options={"proj_drop": proj_drop_rate, "impl": impl, "device": device, "dtype": dtype},
        )

        def make_block(*, depth: int, **arguments) -> GridBlock:
            block = GridBlock(depth=depth, **arguments)
            made = layout.attention(layout.place(0, depth))
            if made is not None:
                block.attn, block.takes_grid = made, True  # pyright: ignore[reportAttributeAccessIssue]
            return block

        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            embed_layer=CompletedPatchEmbed,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_layer=norm_layer,
            act_layer=act_layer,
            mlp_layer=mlp_layer,
            weight_init=weight_init,
            block_fn=make_block,  # pyright: ignore[reportArgumentType]
            device=device,
            dtype=dtype,
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Tables of positions and the class token."""
        return position_tables(self)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make another input size native: the position embedding and what attentions learnt for one are interpolated.

        Raises:
            ValueError: `patch_size` is not None; patches stay as they are.
        """
        if patch_size is not None:
            raise ValueError(f"patch_size={patch_size} must be None: patches cannot be resized")
        old = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size)
        grid_size = self.patch_embed.grid_size
        resized = self._resize_table(self.pos_embed.detach(), old, grid_size)
        self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        set_grid_size(self.blocks, grid_size)
        update_model_input_size(self, self.patch_embed.img_size)

    @property
    def position_grids(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the maps that position embeddings are learnt for, by name."""
        return {"pos_embed": self.patch_embed.grid_size}

    @staticmethod
    def _resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
        """The position embedding, in the order of its rows, for another grid."""
        return resize_positions(table, old, new, prefix=1)

    def _positions(self, grid_size: tuple[int, int]) -> Tensor:
        """The position embedding of a grid, `[1, 1 + H * W, dim]`, class token first."""
        return self._resize_table(self.pos_embed, self.patch_embed.grid_size, grid_size)

    def _tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images to tokens `[B, 1 + H * W, dim]` with positions, and their H and W."""
        x = self.patch_embed(x)
        grid_size = (x.shape[1], x.shape[2])
        positions = self._positions(grid_size)
        assert self.cls_token is not None
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1)
        return self.pos_drop(tokens + positions), grid_size

    def _block(self, block: nn.Module, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        return checkpoint(block, x, grid_size) if self.grad_checkpointing else block(x, grid_size)

    def forward_intermediates(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list | tuple[Tensor, list]:
        """Outputs of blocks.

        Args:
            x: images `[B, in_chans, H, W]`.
            indices: the last n blocks when an int, these blocks when a list, all when None.
            return_prefix_tokens: pair every output with its class token `[B, 1, dim]`.
            norm: apply the classifier's norm to all outputs.
            stop_early: leave out blocks after the last wanted one.
            output_fmt: "NCHW", "NHWC" or "NLC", each without the class token.
            intermediates_only: return the list alone.

        Returns:
            the outputs, or the output of `forward_features` and the outputs.
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW', 'NHWC' or 'NLC'")
        take, last = feature_take_indices(len(self.blocks), indices)
        intermediates = []
        x, grid_size = self._tokens(x)
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._block(block, x, grid_size)
            if i in take:
                tap = self.norm(x) if norm else x
                out = tap[:, 1:] if output_fmt == "NLC" else tap[:, 1:].unflatten(1, grid_size)
                out = out.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else out
                intermediates.append((out, tap[:, :1]) if return_prefix_tokens else out)
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def forward_features(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Images `[B, in_chans, H, W]` to normalised tokens `[B, 1 + H' * W', dim]`, class token first."""
        x, grid_size = self._tokens(x)
        for block in self.blocks:
            x = self._block(block, x, grid_size)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Images `[B, in_chans, H, W]` to logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))
