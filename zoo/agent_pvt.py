"""Agent-PVT: PVT's layout, with agent attention over whole maps instead of reduced keys (arXiv:2312.08874).

Every stage has its own patch and position embedding. Parameter names are those of the official checkpoints.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from timm.layers import calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.agent import AgentAttention2d
from .agent_backbone import NumberedBackbone
from .agent_checkpoint import add_positions, agent_cfg, checkpoint_filter_fn, resample_positions, stage_grids
from .builder import build_backbone
from .dinat import Block
from .patches import CompletedPatchEmbed

torch.fx.wrap("add_positions")  # it asks for shapes
LayerNorm1e6 = partial(nn.LayerNorm, eps=1e-6)


class AgentPVT(NumberedBackbone):
    """Agent-PVT for images of any size; sides that patches do not divide are zero-padded right and bottom.

    Args:
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        img_size: input size whose biases and position embeddings are learnt; images of other sizes go through with
            interpolated ones.
        embed_dims, depths, num_heads, mlp_ratios: channels, blocks, heads and hidden over embedding width by stage.
        num_agents: agents in each stage, square numbers.
        stage_norms: normalise each stage's map by `norm0`, `norm1`, ...; otherwise no map is normalised, as upstream.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
        norm_layer, act_layer: layers of the blocks.
        impl: implementation of the attention; see `foveal.kernels.ops.agent_attention`.
    """

    stages_name: ClassVar[str] = "block{}"

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        num_agents: Sequence[int] = (9, 16, 49, 49),
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
    ):
        super().__init__()
        if not len(embed_dims) == len(depths) == len(num_heads) == len(num_agents) == len(mlp_ratios):
            raise ValueError(
                f"embed_dims={embed_dims}, depths={depths}, num_heads={num_heads}, num_agents={num_agents} and "
                f"mlp_ratios={mlp_ratios} must be equally long"
            )
        dd = {"device": device, "dtype": dtype}
        reductions = [4 * 2**i for i in range(len(depths))]
        self._native_grids = stage_grids(to_2tuple(img_size), reductions)
        drop_paths = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        for i, (dim, (rows, columns)) in enumerate(zip(embed_dims, self._native_grids, strict=True)):
            embed = CompletedPatchEmbed(
                img_size=None,
                patch_size=2 if i else 4,
                in_chans=embed_dims[i - 1] if i else in_chans,
                embed_dim=dim,
                norm_layer=nn.LayerNorm,
                output_fmt="NHWC",
                dynamic_img_pad=True,
                **dd,
            )
            make_attn = partial(
                AgentAttention2d,
                dim,
                num_heads=num_heads[i],
                num_agents=num_agents[i],
                grid_size=(rows, columns),
                separate_query=True,
                proj_drop=proj_drop_rate,
                impl=impl,
                **dd,
            )
            blocks = [
                Block(
                    dim,
                    attn=make_attn(),
                    mlp_ratio=mlp_ratios[i],
                    layer_scale=None,
                    proj_drop=proj_drop_rate,
                    drop_path=next(drop_paths),
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    **dd,
                )
                for _ in range(depths[i])
            ]
            self.register_parameter(f"pos_embed{i + 1}", nn.Parameter(torch.empty(1, rows * columns, dim, **dd)))
            self.add_module(f"patch_embed{i + 1}", embed)
            self.add_module(f"block{i + 1}", nn.Sequential(*blocks))
        self._build_head(
            feature_info=[
                {"num_chs": dim, "reduction": reduction, "module": f"block{i}"}
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

    def _embed(self, index: int, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the map that stage `index` takes, positions included."""
        x = self.get_submodule(f"patch_embed{index + 1}")(x)
        return add_positions(x, getattr(self, f"pos_embed{index + 1}"), self._native_grids[index])

    def patch_embed(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Images `[B, in_chans, H, W]` to the map that the first stage takes."""
        return self._embed(0, x)

    def _down(self, index: int, x: Tensor) -> Tensor:
        return self._embed(index + 1, x.permute(0, 3, 1, 2))

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
        """Make another input size native: axis biases and position embeddings are interpolated."""
        super().set_input_size(img_size)
        grids = self._grids(to_2tuple(img_size))
        for i, (old, new) in enumerate(zip(self._native_grids, grids, strict=True), 1):
            table = self.get_parameter(f"pos_embed{i}")
            resized = resample_positions(table.detach(), old, new)
            self.register_parameter(f"pos_embed{i}", nn.Parameter(resized, requires_grad=table.requires_grad))
        self._native_grids = grids

    def _shorten(self, last: int) -> None:
        for number in range(last + 2, len(self._stages) + 1):
            delattr(self, f"patch_embed{number}")
            delattr(self, f"pos_embed{number}")
        super()._shorten(last)
        self._native_grids = self._native_grids[: last + 1]


CHECKPOINTS: dict[str, dict] = {
    "agent_pvt_t.leap_in1k": {},
    "agent_pvt_s.leap_in1k": {},
    "agent_pvt_m.leap_in1k": {},
    "agent_pvt_m.leap_in1k_256": {"input_size": (3, 256, 256), "pool_size": (8, 8)},
    "agent_pvt_l.leap_in1k": {},
}
default_cfgs = generate_default_cfgs(
    {name: agent_cfg(name, first_conv="patch_embed1.proj", **overrides) for name, overrides in CHECKPOINTS.items()}
)


def _create_agent_pvt(variant: str, pretrained: bool, **kwargs) -> AgentPVT:
    return build_backbone(AgentPVT, variant, pretrained, filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def agent_pvt_t(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Tiny, trained with drop path 0.1."""
    return _create_agent_pvt("agent_pvt_t", pretrained, **({"depths": (2, 2, 2, 2)} | kwargs))


@register_model
def agent_pvt_s(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Small, trained with drop path 0.1."""
    return _create_agent_pvt("agent_pvt_s", pretrained, **({"depths": (3, 4, 6, 3)} | kwargs))


@register_model
def agent_pvt_m(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Medium, trained with drop path 0.3."""
    return _create_agent_pvt("agent_pvt_m", pretrained, **({"depths": (3, 4, 18, 3)} | kwargs))


@register_model
def agent_pvt_l(pretrained: bool = False, **kwargs) -> AgentPVT:
    """Agent-PVT-Large, trained with drop path 0.3."""
    return _create_agent_pvt("agent_pvt_l", pretrained, **({"depths": (3, 8, 27, 3)} | kwargs))
