"""CSWin Transformer's layout: overlapping convolutions, blocks that attend in stripes (arXiv:2107.00652)."""

from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import torch
from timm.layers import DropPath, Mlp, register_notrace_module, to_2tuple
from torch import Tensor, nn

from ...kernels.common.symbolic import at_most, ceil_div, known, modulo
from ...kernels.ops import window_attention
from ...layers.completion import complete, complete_multiples
from ...layers.routing import conv_nhwc
from .base import NumberedHost, stage_grids
from .blocks import AttentionFactory, Blocks, Layout, Place


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
            coordinate = torch.where(modulo(line, side + 1) < side, line - line // (side + 1), length).clamp(max=length)
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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor) -> Tensor:
        """Maps `[B, H, W, heads, d]` to `[B, H, W, dim]`; `x`, the input of the block, has no part in it."""
        window = self._window(query.shape[1], query.shape[2])
        out = window_attention(query, key, value, window=window, impl=self.impl)
        return out.flatten(3) + self._positions(value.flatten(3), window)

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("TorchScript cannot compile StripeBranch2d; use torch.export or torch.compile")


class CSWinBlock(nn.Module):
    """Pre-norm block on `[B, H, W, dim]` that projects for its branches, which share channels and heads evenly.

    A branch is called as `branch(query, key, value, x)`: maps `[B, H, W, heads, d]` and its channels of the block's
    input before the norm, `[B, H, W, heads * d]`, which it returns the size of.
    """

    def __init__(
        self,
        dim: int,
        *,
        attn: nn.Module,
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
        self.attns = attn if isinstance(attn, nn.ModuleList) else nn.ModuleList([attn])
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))  # [B, H, W, 3, heads, d]
        heads, channels = self.num_heads // len(self.attns), x.shape[-1] // len(self.attns)
        mixed = []
        for i, attn in enumerate(self.attns):
            part = qkv[..., i * heads : (i + 1) * heads, :]
            own = x[..., i * channels : (i + 1) * channels]
            mixed.append(attn(part[:, :, :, 0], part[:, :, :, 1], part[:, :, :, 2], own))
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


class CSWin(NumberedHost):
    """CSWin's layout around any attention without projections, for images of any size.

    Parameters are named as in the official checkpoints. Without `attn` it is CSWin Transformer itself.

    Args:
        attn: makes the attention of a block, one branch for all heads, called as in `CSWinBlock`; see
            `foveal.zoo.hosts.Place`. The host's own attends in stripes: half of the channels in vertical ones, half in
            horizontal ones, and in the last stage in one window over the whole map.
        in_chans, num_classes, global_pool, drop_rate, norm_layer, act_layer, impl: as in `Swin`.
        img_size: native input size, for which attentions may learn positions.
        embed_dim: channels of the first stage; every further stage doubles them.
        depths, num_heads: blocks and heads of each stage.
        split: width of the stripes, of all stages or of each; when None a 32nd of the image in the last two stages and
            1, 2, 4, ... in those before.
        mlp_ratio: hidden over embedding width.
        stage_norms: normalise each stage's map by `norm0`, `norm1`, ... instead of the last one by `norm`.
        proj_drop_rate, drop_path_rate: dropout in blocks, stochastic depth.
        attn_options: further arguments of `attn`; a list or tuple has one entry per stage.
    """

    first_conv: ClassVar[str] = "stage1_conv_embed.0"

    def __init__(
        self,
        *,
        attn: AttentionFactory | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        split: int | Sequence[int] | None = None,
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
        **attn_options: Any,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        size: tuple[int, int] = to_2tuple(img_size)
        channels = [embed_dim * 2**i for i in range(len(depths))]
        reductions = [4 * 2**i for i in range(len(depths))]
        last = len(depths) - 1
        if split is None:
            split = [2**i if i < last - 1 else max(1, min(size) // 32) for i in range(len(depths))]

        def make_block(place: Place, **parts) -> CSWinBlock:
            return CSWinBlock(
                place.dim,
                num_heads=place.num_heads,
                mlp_ratio=mlp_ratio,
                proj_drop=proj_drop_rate,
                norm_layer=norm_layer,
                act_layer=act_layer,
                **parts,
                **dd,
            )

        layout = Layout(
            attn=attn,
            attn_options=attn_options,
            own=stripes,
            block=make_block,
            channels=channels,
            depths=depths,
            num_heads=num_heads,
            grids=stage_grids(size, reductions),
            windows=[*([split] * last if isinstance(split, int) else split[:last]), None],
            drop_path_rate=drop_path_rate,
            options={"impl": impl, **dd},
        )
        self.stage1_conv_embed = CSWinStem(in_chans, embed_dim, norm_layer=norm_layer, **dd)
        for i, dim in enumerate(channels):
            self.add_module(f"stage{i + 1}", Blocks(*layout.blocks(i)))
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

    def _enter(self, index: int, x: Tensor) -> Tensor:
        return self.stage1_conv_embed(x) if index == 0 else self.get_submodule(f"merge{index}")(x)

    def _truncate(self, last: int) -> None:
        for number in range(last + 1, len(self._stages)):
            delattr(self, f"merge{number}")
        super()._truncate(last)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that order parameters by depth (layer decay, freezing)."""
        fine = [(r"^stage(\d+)\.(\d+)", None), (r"^merge(\d+)", (99999,)), (r"^norm", (99999,))]
        return {"stem": r"^stage1_conv_embed", "blocks": r"^(?:stage|merge)(\d+)\." if coarse else fine}


def stripes(place: Place) -> nn.ModuleList:
    """CSWin's own branches: vertical and horizontal stripes, or one window over the whole map."""
    if place.window is None:
        return nn.ModuleList([StripeBranch2d(place.dim, **place.options)])
    return nn.ModuleList(
        StripeBranch2d(place.dim // 2, split=place.window, vertical=vertical, **place.options)
        for vertical in (True, False)
    )
