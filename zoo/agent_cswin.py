"""Agent-CSWin: CSWin's layout, with agent attention over whole maps in the early stages (arXiv:2312.08874).

Later stages attend in stripes: half of the channels in vertical ones, half in horizontal ones (arXiv:2107.00652).
Parameter names are those of the official checkpoints.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, register_notrace_module
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..kernels.ops import window_attention
from ..kernels.symbolic import at_most, ceil_div, known
from ..layers.agent import AgentBranch2d
from ..layers.completion import complete, complete_multiples
from ..layers.routing import conv_nhwc
from .agent_backbone import NumberedBackbone
from .agent_checkpoint import agent_cfg, checkpoint_filter_fn, stage_grids
from .builder import build_backbone

AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12)}


@register_notrace_module
class StripeBranch2d(nn.Module):
    """Attention inside stripes, plus a depthwise 3x3 convolution of the values that stays inside them (LePE).

    Args:
        dim: channels.
        split: width of the stripes; None: one window, the whole map.
        vertical: whether stripes stand upright, over all rows and `split` columns, or lie.
        impl: see `foveal.kernels.ops.window_attention`.
    """

    def __init__(
        self, dim: int, *, split: int | None = None, vertical: bool = True, impl: str = "auto", device=None, dtype=None
    ):
        super().__init__()
        self.dim, self.split, self.vertical, self.impl = dim, split, vertical, impl
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def _positions(self, value: Tensor, window: tuple[int, int]) -> Tensor:
        """The convolution of maps `[B, H, W, dim]`, window by window: a line of zeros stands between neighbours."""
        x, places = value, []
        for axis, side in enumerate(window, 1):
            length = x.shape[axis]
            if known(side >= length):
                continue
            line = torch.arange(ceil_div(length, side) * (side + 1), device=x.device)
            coordinate = torch.where(line % (side + 1) < side, line - line // (side + 1), length).clamp(max=length)
            x = complete(x, [length + 1], first=axis).index_select(axis, coordinate)
            coordinate = torch.arange(length, device=x.device)
            places.append((axis, coordinate + coordinate // side))
        x = conv_nhwc(self.get_v, x)
        for axis, place in places:
            x = x.index_select(axis, place)
        return x

    def _window(self, rows: int, columns: int) -> tuple[int, int]:
        if self.split is None:
            return rows, columns
        return (rows, at_most(self.split, columns)) if self.vertical else (at_most(self.split, rows), columns)

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention for one map of this size, all stripes whole."""
        window = self._window(*shape)
        stripes = -(-shape[0] // window[0]) * -(-shape[1] // window[1])
        return 2 * self.dim * stripes * (window[0] * window[1]) ** 2

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Maps `[B, H, W, heads, d]` to `[B, H, W, dim]`."""
        window = self._window(query.shape[1], query.shape[2])
        out = window_attention(query, key, value, window=window, impl=self.impl)
        return out.flatten(3) + self._positions(value.flatten(3), window)

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("TorchScript cannot compile StripeBranch2d; use torch.export or torch.compile")


class CSWinBlock(nn.Module):
    """Pre-norm block on `[B, H, W, dim]` whose branches `attns` share channels and heads evenly."""

    def __init__(
        self,
        dim: int,
        *,
        branches: Sequence[nn.Module],
        num_heads: int,
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        norm_layer: type[nn.Module],
        act_layer: type[nn.Module],
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.norm1 = norm_layer(dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.attns = nn.ModuleList(branches)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))  # [B, H, W, 3, heads, d]
        heads = self.num_heads // len(self.attns)
        mixed = []
        for i, attn in enumerate(self.attns):
            part = qkv[..., i * heads : (i + 1) * heads, :]
            mixed.append(attn(part[:, :, :, 0], part[:, :, :, 1], part[:, :, :, 2]))
        x = x + self.drop_path1(self.proj_drop(self.proj(torch.cat(mixed, dim=-1))))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


@register_notrace_module
class CSWinStem(nn.Sequential):
    """7x7 convolution of stride 4: `[B, in_chans, H, W]` to `[B, ceil(H / 4), ceil(W / 4), dim]`.

    Sides that 4 does not divide are zero-padded right and bottom. Entry 1 moves channels last and has no parameters.
    """

    def __init__(self, in_chans: int, dim: int, *, norm_layer: type[nn.Module], device=None, dtype=None):
        conv = nn.Conv2d(in_chans, dim, 7, stride=4, padding=2, device=device, dtype=dtype)
        super().__init__(conv, nn.Identity(), norm_layer(dim, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        conv, _, norm = self
        return norm(conv(complete_multiples(input, (4, 4), first=2)).permute(0, 2, 3, 1))


class CSWinMerge(nn.Module):
    """3x3 convolution of stride 2: `[B, H, W, dim]` to `[B, ceil(H / 2), ceil(W / 2), out_dim]`."""

    def __init__(self, dim: int, out_dim: int, *, norm_layer: type[nn.Module], device=None, dtype=None):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, device=device, dtype=dtype)
        self.norm = norm_layer(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class AgentCSWin(NumberedBackbone):
    """Agent-CSWin for images of any size.

    Args:
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        img_size: input size whose biases are learnt; images of other sizes go through with interpolated biases.
        embed_dim: channels of the first stage; every further stage doubles them.
        depths, num_heads: blocks and heads of each stage.
        num_agents: agents in each stage, square numbers; None: the stage attends in stripes, the last one in one
            window over the whole map.
        split: width of the stripes; a 32nd of the image when None, as upstream (7 at 224 pixels, 12 at 384).
        mlp_ratio: hidden over embedding width.
        stage_norms: normalise each stage's map by `norm0`, `norm1`, ... instead of the last one by `norm`.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
        norm_layer, act_layer: layers of the blocks.
        impl: implementation of the attention; see `foveal.kernels.ops.agent_attention` and `window_attention`.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        num_agents: Sequence[int | None] = (9, 16, None, None),
        split: int | None = None,
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
        if not len(depths) == len(num_heads) == len(num_agents):
            raise ValueError(f"depths={depths}, num_heads={num_heads} and num_agents={num_agents} must be equally long")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        split = max(1, min(size) // 32) if split is None else split
        channels = [embed_dim * 2**i for i in range(len(depths))]
        reductions = [4 * 2**i for i in range(len(depths))]
        grids = stage_grids(size, reductions)
        last = len(depths) - 1
        drop_paths = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))

        def make_branches(stage: int) -> Sequence[nn.Module]:
            dim, agents = channels[stage], num_agents[stage]
            if agents is not None:
                shared = {"num_heads": num_heads[stage], "num_agents": agents, "conv_name": "get_v"}
                return [AgentBranch2d(dim, grid_size=grids[stage], impl=impl, **shared, **dd)]
            if stage == last:
                return [StripeBranch2d(dim, impl=impl, **dd)]
            return [StripeBranch2d(dim // 2, split=split, vertical=v, impl=impl, **dd) for v in (True, False)]

        self.stage1_conv_embed = CSWinStem(in_chans, embed_dim, norm_layer=norm_layer, **dd)
        for i, dim in enumerate(channels):
            blocks = [
                CSWinBlock(
                    dim,
                    branches=make_branches(i),
                    num_heads=num_heads[i],
                    mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate,
                    drop_path=next(drop_paths),
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    **dd,
                )
                for _ in range(depths[i])
            ]
            self.add_module(f"stage{i + 1}", nn.Sequential(*blocks))
            if i < last:
                self.add_module(f"merge{i + 1}", CSWinMerge(dim, 2 * dim, norm_layer=norm_layer, **dd))
        self._build_head(
            feature_info=[
                {"num_chs": dim, "reduction": reduction, "module": f"stage{i}"}
                for i, (dim, reduction) in enumerate(zip(channels, reductions, strict=True), 1)
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

    def patch_embed(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Images `[B, in_chans, H, W]` to the map that the first stage takes."""
        return self.stage1_conv_embed(x)

    def _down(self, index: int, x: Tensor) -> Tensor:
        return self.get_submodule(f"merge{index + 1}")(x)

    def _shorten(self, last: int) -> None:
        for number in range(last + 1, len(self._stages)):
            delattr(self, f"merge{number}")
        super()._shorten(last)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that order parameters by depth (layer decay, freezing)."""
        fine = [(r"^stage(\d+)\.(\d+)", None), (r"^merge(\d+)", (99999,)), (r"^norm", (99999,))]
        return {"stem": r"^stage1_conv_embed", "blocks": r"^(?:stage|merge)(\d+)\." if coarse else fine}


CHECKPOINTS: dict[str, dict] = {
    "agent_cswin_t.leap_in1k": {},
    "agent_cswin_s.leap_in1k": {},
    "agent_cswin_b.leap_in1k": {},
    "agent_cswin_b.leap_in1k_384": AT_384,
}
default_cfgs = generate_default_cfgs(
    {name: agent_cfg(name, first_conv="stage1_conv_embed.0", **overrides) for name, overrides in CHECKPOINTS.items()}
)


def _create_agent_cswin(variant: str, pretrained: bool, **kwargs) -> AgentCSWin:
    return build_backbone(AgentCSWin, variant, pretrained, filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def agent_cswin_t(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSWin-Tiny, trained with drop path 0.2."""
    model_args = {"depths": (2, 4, 18, 1)}
    return _create_agent_cswin("agent_cswin_t", pretrained, **(model_args | kwargs))


@register_model
def agent_cswin_s(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSWin-Small, trained with drop path 0.4."""
    model_args = {"depths": (3, 6, 29, 2)}
    return _create_agent_cswin("agent_cswin_s", pretrained, **(model_args | kwargs))


@register_model
def agent_cswin_b(pretrained: bool = False, **kwargs) -> AgentCSWin:
    """Agent-CSWin-Base, trained with drop path 0.5, at 384 pixels 0.7."""
    model_args = {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)}
    return _create_agent_cswin("agent_cswin_b", pretrained, **(model_args | kwargs))
