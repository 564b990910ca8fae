"""Agent-DeiT: DeiT with agent attention (arXiv:2312.08874).

timm's `VisionTransformer`, whose blocks learn the grid of their tokens. Parameter names are those of the official
checkpoints.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..layers.agent import AgentAttention2d
from .agent_checkpoint import agent_cfg, checkpoint_filter_fn, resample_positions, set_agent_grids
from .builder import build_backbone
from .patches import CompletedPatchEmbed

LayerNorm1e6 = partial(nn.LayerNorm, eps=1e-6)


class AgentBlock(Block):
    """timm's block around agent attention; `[B, 1 + H * W, dim]`, class token first."""

    def forward(self, x: Tensor, grid_size: tuple[int, int]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = x + self.drop_path1(self.attn(self.norm1(x), grid_size=grid_size))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class AgentDeiT(VisionTransformer):
    """Agent-DeiT for images of any size; sides that patches do not divide are zero-padded right and bottom.

    Args:
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "token", "avg", "max", "avgmax" or "" (none).
        img_size: input size whose biases and position embedding are learnt; images of other sizes go through with
            interpolated ones.
        patch_size: side of the patches.
        embed_dim, depth, num_heads: channels, blocks, heads.
        num_agents: agents, a square number.
        agent_blocks: leading blocks with agent attention, the others have plain attention; all when None.
        mlp_ratio: hidden over embedding width.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
        norm_layer, act_layer: layers of the blocks.
        impl: implementation of agent attention; see `foveal.kernels.ops.agent_attention`.
    """

    output_fmt: Literal["NLC"] = "NLC"

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "avgmax", "max", "token"] = "token",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_agents: int = 49,
        agent_blocks: int | None = None,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = LayerNorm1e6,
        act_layer: type[nn.Module] = nn.GELU,
        impl: str = "auto",
        device=None,
        dtype=None,
    ):
        rows, columns = (img_size, img_size) if isinstance(img_size, int) else img_size
        agent_blocks = depth if agent_blocks is None else agent_blocks

        def make_block(*, depth: int, **arguments) -> Block:
            if depth >= agent_blocks:
                return Block(depth=depth, **arguments)
            block = AgentBlock(depth=depth, **arguments)
            block.attn = AgentAttention2d(  # pyright: ignore[reportAttributeAccessIssue]
                embed_dim,
                num_heads=num_heads,
                num_agents=num_agents,
                grid_size=(rows // patch_size, columns // patch_size),
                class_token=True,
                proj_drop=proj_drop_rate,
                impl=impl,
                device=device,
                dtype=dtype,
            )
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
            block_fn=make_block,  # pyright: ignore[reportArgumentType]
            device=device,
            dtype=dtype,
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Tables of positions and the class token."""
        leaves = ("weight", "bias")
        return {n for n, p in self.named_parameters() if p.ndim > 1 and n.rsplit(".", 1)[-1] not in leaves}

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make another input size native: axis biases and the position embedding are interpolated.

        Raises:
            ValueError: `patch_size` is not None; patches stay as they are.
        """
        if patch_size is not None:
            raise ValueError(f"patch_size={patch_size} must be None: patches cannot be resized")
        old = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size)
        grid_size = self.patch_embed.grid_size
        resized = resample_positions(self.pos_embed.detach(), old, grid_size, prefix=1)
        self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        set_agent_grids([self.blocks], [grid_size])
        update_model_input_size(self, self.patch_embed.img_size)

    def _tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images to tokens `[B, 1 + H * W, dim]` with positions, and their H and W."""
        x = self.patch_embed(x)
        grid_size = (x.shape[1], x.shape[2])
        positions = resample_positions(self.pos_embed, self.patch_embed.grid_size, grid_size, prefix=1)
        assert self.cls_token is not None
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1)
        return self.pos_drop(tokens + positions), grid_size

    def _block(self, block: nn.Module, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        arguments = (x, grid_size) if isinstance(block, AgentBlock) else (x,)
        return checkpoint(block, *arguments) if self.grad_checkpointing else block(*arguments)

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


CHECKPOINTS: dict[str, dict] = {
    "agent_deit_t.leap_in1k": {},
    "agent_deit_s.leap_in1k": {},
    "agent_deit_s.leap_in1k_448": {"input_size": (3, 448, 448), "pool_size": (28, 28)},
    "agent_deit_b.leap_in1k": {},
}
FIRST = {"first_conv": "patch_embed.proj", "pool_size": (14, 14)}
default_cfgs = generate_default_cfgs({name: agent_cfg(name, **(FIRST | cfg)) for name, cfg in CHECKPOINTS.items()})


def _create_agent_deit(variant: str, pretrained: bool, **kwargs) -> AgentDeiT:
    return build_backbone(AgentDeiT, variant, pretrained, filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def agent_deit_t(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-Tiny, trained without drop path."""
    return _create_agent_deit("agent_deit_t", pretrained, **({"embed_dim": 192, "num_heads": 3} | kwargs))


@register_model
def agent_deit_s(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-Small, trained with drop path 0.1."""
    return _create_agent_deit("agent_deit_s", pretrained, **({"embed_dim": 384, "num_heads": 6} | kwargs))


@register_model
def agent_deit_b(pretrained: bool = False, **kwargs) -> AgentDeiT:
    """Agent-DeiT-Base, trained with drop path 0.3; agents in the first four blocks only."""
    model_args = {"embed_dim": 768, "num_heads": 12, "num_agents": 81, "agent_blocks": 4}
    return _create_agent_deit("agent_deit_b", pretrained, **(model_args | kwargs))
