"""L2ViT: windows of softmax attention and global linear attention in turns (arXiv:2501.16182).

Depthwise convolutions tell tokens where they are; nothing else does, so images of any size go through. Parameter names
are those of the official checkpoints.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, NoReturn

from timm.layers import DropPath, Mlp, calculate_drop_path_rates, register_notrace_module
from torch import Tensor, nn

from ...kernels.common.calling import Impl
from ...kernels.ops import window_attention
from ...layers.completion import complete_multiples, crop
from ...layers.linear import LinearAttention, LocalConcentration
from ...layers.routing import conv_nhwc
from ..builder import DIGITS_CFG, Model, register_family
from ..hosts.base import ListedBackbone
from ..hosts.blocks import Blocks, equally_long


class PaddedWindowAttention2d(nn.Module):
    """Attention inside windows of `[B, H, W, dim]`, without a bias and without a shift.

    Maps that the window does not divide are zero-padded right and bottom before the projections, without a mask, as in
    the official code: padded tokens are keys of their window.

    Args:
        dim: channels of the input and the output.
        num_heads: heads; a divisor of dim.
        window: side of the windows.
        proj_drop: dropout after the output projection.
        impl: "auto", "triton", "torch" or "reference"; see `foveal.kernels.ops.window_attention`.
    """

    def __init__(
        self, dim: int, *, num_heads: int, window: int, proj_drop: float, impl: Impl, device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.window = dim, num_heads, window
        self.impl: Impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = complete_multiples(x, (self.window, self.window))
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)  # [B, H, W, heads, d]
        out = window_attention(query, key, value, window=self.window, impl=self.impl)
        return self.proj_drop(self.proj(crop(out, (height, width)).flatten(3)))

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention for one map of this size."""
        rows, columns = (-(-n // self.window) for n in shape)
        return 2 * self.dim * rows * columns * self.window**4

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window={self.window}"

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("TorchScript cannot compile L2ViT; use torch.export or torch.compile")


class PositionalConv(nn.Module):
    """Conditional position encoding: a depthwise 3x3 convolution added to its input, `[B, H, W, dim]`."""

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + conv_nhwc(self.proj, x)


class Block(nn.Module):
    """Pre-norm block on `[B, H, W, dim]`, around a position encoding.

    After linear attention comes local concentration; after windows a second position encoding.
    """

    def __init__(
        self,
        dim: int,
        *,
        attn: nn.Module,
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        norm_layer: type[nn.Module],
        act_layer: type[nn.Module],
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        linear = isinstance(attn, LinearAttention)
        self.cpe = nn.ModuleList(PositionalConv(dim, **dd) for _ in range(1 if linear else 2))
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.norm3 = norm_layer(dim, **dd) if linear else None
        self.local_mp = LocalConcentration(dim, act_layer=act_layer, **dd) if linear else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe[0](x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        if self.norm3 is not None and self.local_mp is not None:
            x = x + self.drop_path(self.local_mp(self.norm3(x)))
        else:
            x = self.cpe[1](x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


@register_notrace_module
class PadTo(nn.Module):
    """`[B, C, H, W]`, completed right and bottom by zeros to multiples of `side`."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return complete_multiples(x, (self.side, self.side), first=2)


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2 with batch norms; `[B, C, H, W]`."""

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(dim // 2, **dd),
            nn.ReLU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(dim, **dd),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class PatchEmbed(nn.Module):
    """The stem: images `[B, C, H, W]` to a normalised map `[B, H / 4, W / 4, dim]`, rounded up."""

    def __init__(self, in_chans: int, dim: int, *, norm_layer: type[nn.Module], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pad = PadTo(4)
        self.proj = ConvStem(in_chans, dim, **dd)
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(self.pad(x)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """A norm and a 2x2 convolution: `[B, H, W, dim]` to `[B, H / 2, W / 2, out]`, rounded up."""

    def __init__(self, dim: int, out: int, *, norm_layer: type[nn.Module], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = norm_layer(dim, **dd)
        self.pad = PadTo(2)
        self.proj = nn.Conv2d(dim, out, 2, stride=2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.pad(self.norm(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class L2ViT(ListedBackbone):
    """L2ViT for images of any size.

    Args:
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        embed_dim: channels of the first stage; every further stage doubles them.
        depths, num_heads: blocks and heads of each stage; even blocks have windows, odd ones linear attention.
        window: side of the windows.
        mlp_ratio: hidden over embedding width.
        stage_norms: normalise each stage's map by `norm0`, `norm1`, ... instead of the last one by `norm`, as the
            official detection and segmentation backbones do.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
        norm_layer, act_layer: layers of the blocks.
        impl: implementation of the attention; see `foveal.kernels.ops.linear_attention`.
    """

    first_conv: ClassVar[str] = "downsample_layers.0.proj.proj.0"

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        mlp_ratio: float = 4.0,
        stage_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        impl: Impl = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        equally_long(depths=depths, num_heads=num_heads)
        dd = {"device": device, "dtype": dtype}
        channels = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))

        def make_attn(stage: int, index: int) -> nn.Module:
            shared = {"num_heads": num_heads[stage], "proj_drop": proj_drop_rate, "impl": impl, **dd}
            if index % 2:
                return LinearAttention(channels[stage], **shared)
            return PaddedWindowAttention2d(channels[stage], window=window, **shared)

        def make_block(stage: int, index: int) -> Block:
            return Block(
                channels[stage],
                attn=make_attn(stage, index),
                mlp_ratio=mlp_ratio,
                proj_drop=proj_drop_rate,
                drop_path=next(drop_paths),
                norm_layer=norm_layer,
                act_layer=act_layer,
                **dd,
            )

        merges = (PatchMerging(a, b, norm_layer=norm_layer, **dd) for a, b in pairwise(channels))
        self.downsample_layers = nn.ModuleList([PatchEmbed(in_chans, embed_dim, norm_layer=norm_layer, **dd), *merges])
        self.stages = nn.Sequential(
            *(Blocks(*(make_block(i, j) for j in range(depth))) for i, depth in enumerate(depths))
        )
        self._build_head(
            feature_info=[
                {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(channels)
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


TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
SMALL = {**TINY, "depths": (2, 2, 18, 2)}
BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
PICO = {"embed_dim": 28, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "window": 4, "mlp_ratio": 2.0}
TEST = {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "window": 3}
FINE_TUNED_384 = "l2vit_b.chuanyangzheng_in22k_ft_in1k_384"
MODELS = {
    "l2vit_t": Model("L2ViT-Tiny.", L2ViT, TINY),
    "l2vit_s": Model("L2ViT-Small.", L2ViT, SMALL),
    "l2vit_b": Model(
        "L2ViT-Base, trained with drop path 0.3; the tag of 384 pixels brings windows of 12.", L2ViT, BASE
    ),
    "l2vit_pico": Model("Three stages for 32x32 single-channel images (handwritten digits).", L2ViT, PICO),
    "test_l2vit": Model("L2ViT for tests.", L2ViT, TEST),
}
register_family(
    __name__,
    MODELS,
    cfg={"paper_ids": "arXiv:2501.16182"},
    cfgs={FINE_TUNED_384: {"crop_pct": 1.0, "crop_mode": "squash"}, "l2vit_pico.untrained": DIGITS_CFG},
    checkpoint_args={FINE_TUNED_384: {"window": 12}},
    leaves=(LinearAttention, PaddedWindowAttention2d),
)
