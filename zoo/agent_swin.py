"""Agent-Swin: Swin's layout, with agent attention over whole maps in the early stages (arXiv:2312.08874).

The first blocks of a stage attend through agents, the others inside shifted windows. Parameter names are those of the
official checkpoints.
"""

from collections.abc import Sequence

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from timm.models._input import update_model_input_size
from torch import nn

from ..layers.agent import AgentAttention2d
from ..layers.window import WindowAttention2d
from .agent_checkpoint import agent_cfg, checkpoint_filter_fn, set_agent_grids, stage_grids
from .backbone import Backbone, Stage
from .builder import build_backbone
from .dinat import Block
from .dinat_s import patch_stem
from .patches import CompletedPatchMerging


class AgentSwin(Backbone):
    """Agent-Swin for images of any size.

    Args:
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        img_size: input size whose biases are learnt; images of other sizes go through with interpolated biases.
        embed_dim: channels of the first stage; every further stage doubles them.
        depths, num_heads: blocks and heads of each stage.
        num_agents: agents in each stage, square numbers.
        agent_blocks: leading blocks of each stage with agent attention; the others have windows.
        window: side of these; a 32nd of the image but 7 at least when None, as upstream.
        mlp_ratio: hidden over embedding width.
        stage_norms: normalise each stage's map by `norm0`, `norm1`, ... instead of the last one by `norm`, as Swin's
            detection and segmentation backbones do.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
        norm_layer, act_layer: layers of the blocks.
        impl: implementation of the attention; see `foveal.kernels.ops.agent_attention`.
    """

    stages_name = "layers"

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        num_agents: Sequence[int] = (9, 16, 49, 49),
        agent_blocks: Sequence[int] = (2, 2, 6, 0),
        window: int | None = None,
        mlp_ratio: float = 4.0,
        stage_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        impl: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not all(0 <= few <= depth for few, depth in zip(agent_blocks, depths, strict=False)):
            raise ValueError(f"agent_blocks={agent_blocks} must each lie in [0, depth], depths={depths}")
        if not len(depths) == len(num_heads) == len(num_agents) == len(agent_blocks):
            raise ValueError(
                f"depths={depths}, num_heads={num_heads}, num_agents={num_agents} and agent_blocks={agent_blocks} "
                "must be equally long"
            )
        dd = {"device": device, "dtype": dtype}
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        window = max(7, min(size) // 32) if window is None else window
        channels = [embed_dim * 2**i for i in range(len(depths))]
        self._reductions = [4 * 2**i for i in range(len(depths))]
        grids = stage_grids(size, self._reductions)
        drop_paths = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))

        def make_attn(stage: int, block: int) -> nn.Module:
            shared = {"num_heads": num_heads[stage], "proj_drop": proj_drop_rate, "impl": impl, **dd}
            if block < agent_blocks[stage]:
                agents, grid_size = num_agents[stage], grids[stage]
                return AgentAttention2d(channels[stage], num_agents=agents, grid_size=grid_size, **shared)
            return WindowAttention2d(channels[stage], window=window, shift=block % 2 * (window // 2), **shared)

        stages = []
        for i, dim in enumerate(channels):
            blocks = [
                Block(
                    dim,
                    attn=make_attn(i, b),
                    mlp_ratio=mlp_ratio,
                    layer_scale=None,
                    proj_drop=proj_drop_rate,
                    drop_path=next(drop_paths),
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    **dd,
                )
                for b in range(depths[i])
            ]
            last = i == len(channels) - 1
            stages.append(Stage(blocks, None if last else CompletedPatchMerging(dim, norm_layer=norm_layer, **dd)))
        self.patch_embed = patch_stem(in_chans, embed_dim, norm_layer=norm_layer, **dd)
        self.layers = nn.Sequential(*stages)
        self._build_head(
            feature_info=[
                {"num_chs": dim, "reduction": self._reductions[i], "module": f"layers.{i}.blocks"}
                for i, dim in enumerate(channels)
            ],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=norm_layer,
            stage_norms=stage_norms,
            dd=dd,
        )
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make another input size native: the axis biases of agent attention are interpolated, windows stay."""
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        set_agent_grids(self.layers, stage_grids(size, self._reductions[: len(self.layers)]))
        update_model_input_size(self, size)


CHECKPOINTS: dict[str, dict] = {
    "agent_swin_t.leap_in1k": {},
    "agent_swin_s.leap_in1k": {},
    "agent_swin_s.leap_in1k_288": {"input_size": (3, 288, 288), "pool_size": (9, 9), "crop_pct": 1.0},
    "agent_swin_b.leap_in1k": {},
    "agent_swin_b.leap_in1k_384": {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0},
    "agent_swin_pico.untrained": {
        "url": "",
        "num_classes": 10,
        "input_size": (1, 32, 32),
        "pool_size": (2, 2),
        "crop_pct": 1.0,
        "mean": (0.5,),
        "std": (0.5,),
    },
}
default_cfgs = generate_default_cfgs(
    {name: agent_cfg(name, **({"first_conv": "patch_embed.proj"} | cfg)) for name, cfg in CHECKPOINTS.items()}
)


def _create_agent_swin(variant: str, pretrained: bool, **kwargs) -> AgentSwin:
    return build_backbone(AgentSwin, variant, pretrained, filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def agent_swin_t(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Tiny, trained with drop path 0.2."""
    model_args = {"depths": (2, 2, 6, 2), "agent_blocks": (2, 2, 6, 0)}
    return _create_agent_swin("agent_swin_t", pretrained, **(model_args | kwargs))


@register_model
def agent_swin_s(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Small, trained with drop path 0.3."""
    model_args = {"depths": (2, 2, 18, 2), "agent_blocks": (2, 2, 0, 0)}
    return _create_agent_swin("agent_swin_s", pretrained, **(model_args | kwargs))


@register_model
def agent_swin_b(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Agent-Swin-Base, trained with drop path 0.5."""
    model_args = {
        "embed_dim": 128,
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
        "agent_blocks": (2, 2, 2, 0),
    }
    return _create_agent_swin("agent_swin_b", pretrained, **(model_args | kwargs))


@register_model
def agent_swin_pico(pretrained: bool = False, **kwargs) -> AgentSwin:
    """Three stages for 32x32 single-channel images (handwritten digits)."""
    model_args = {
        "embed_dim": 28,
        "depths": (2, 2, 1),
        "num_heads": (1, 2, 4),
        "num_agents": (9, 4, 4),
        "agent_blocks": (2, 1, 0),
        "window": 4,
        "mlp_ratio": 2.0,
    }
    return _create_agent_swin("agent_swin_pico", pretrained, **(model_args | kwargs))
