"""Residual attention network: trunks of residual units under masks that look at the whole map (arXiv:1704.06904).

The structure is that of the authors' network definitions, for which no weights are published. Pooling is centred on its
tokens, where theirs starts at the border. Images of any size go through.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import BatchNormAct2d, DropPath, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from ..builder import DIGITS_CFG, Model, register_family
from ..hosts.base import NumberedHost
from ..hosts.gated import ConvolutionalBackbone, MapBlocks


class Unit(nn.Module):
    """Pre-activation bottleneck of `[B, dim, H, W]`; the way around it is a convolution where shapes differ."""

    def __init__(
        self, dim: int, out: int, *, stride: int = 1, drop_path: float = 0.0, device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        width = out // 4
        self.norm1 = BatchNormAct2d(dim, **dd)
        self.conv1 = nn.Conv2d(dim, width, 1, bias=False, **dd)
        self.norm2 = BatchNormAct2d(width, **dd)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False, **dd)
        self.norm3 = BatchNormAct2d(width, **dd)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False, **dd)
        same = dim == out and stride == 1
        self.shortcut = None if same else nn.Conv2d(dim, out, 1, stride=stride, bias=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.drop_path(self.conv3(self.norm3(self.conv2(self.norm2(self.conv1(y))))))


@register_notrace_module
class SoftMask(nn.Module):
    """A mask in (0, 1) for each value of `[B, dim, H, W]`, from `levels` halvings of the map and the way back up.

    Args:
        dim: channels.
        levels: halvings; the map is doubled as often, by bilinear interpolation.
    """

    def __init__(self, dim: int, *, levels: int, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def units(count: int) -> nn.ModuleList:
            return nn.ModuleList(Unit(dim, dim, **dd) for _ in range(count))

        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.down, self.skip, self.up = units(levels), units(levels - 1), units(levels)
        self.out = nn.Sequential(
            BatchNormAct2d(dim, **dd),
            nn.Conv2d(dim, dim, 1, bias=False, **dd),
            BatchNormAct2d(dim, **dd),
            nn.Conv2d(dim, dim, 1, bias=False, **dd),
        )

    def forward(self, x: Tensor) -> Tensor:
        size, kept = x.shape[2:], []
        for unit in self.down:
            x = unit(self.pool(x))
            kept.append(x)
        x = self.up[0](kept.pop())
        for skip, up in zip(self.skip, self.up[1:], strict=True):
            finer = kept.pop()
            x = up(F.interpolate(x, finer.shape[2:], mode="bilinear", align_corners=True) + skip(finer))
        return self.out(F.interpolate(x, size, mode="bilinear", align_corners=True)).sigmoid()


class AttentionModule(nn.Module):
    """Two units under a mask, between one unit before and one after; `[B, dim, H, W]` (section 3)."""

    def __init__(self, dim: int, *, levels: int, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        unit = {"drop_path": drop_path, **dd}
        self.first = Unit(dim, dim, **unit)
        self.trunk = nn.Sequential(Unit(dim, dim, **unit), Unit(dim, dim, **unit))
        self.mask = SoftMask(dim, levels=levels, **dd)
        self.last = Unit(dim, dim, **unit)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last((1 + self.mask(x)) * self.trunk(x))


class MapNormAct(BatchNormAct2d):
    """Batch norm and ReLU of `[B, H, W, dim]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ResidualAttentionNet(ConvolutionalBackbone, NumberedHost):
    """Residual attention network for images of any size.

    Args:
        depths: attention modules of each stage, whose masks halve the map 3, 2, 1 times if there are three; then units
            of the last stage, which has none.
        embed_dim: channels of the stem; stages have 4, 8, 16, … times as many.
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head, and of the head's input map; stochastic
            depth, the same for all units of trunks.
    """

    stages_name: ClassVar[str] = "layer{}"
    first_conv: ClassVar[str] = "conv1"

    def __init__(
        self,
        *,
        depths: Sequence[int] = (1, 1, 1, 3),
        embed_dim: int = 64,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        unit = {"drop_path": drop_path_rate, **dd}
        self.conv1 = nn.Conv2d(in_chans, embed_dim, 7, stride=2, padding=3, bias=False, **dd)
        self.norm1 = BatchNormAct2d(embed_dim, **dd)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        before, info = embed_dim, []
        for i, count in enumerate(depths):
            dim, levels = 4 * embed_dim * 2**i, len(depths) - 1 - i
            first = Unit(before, dim, stride=1 if i == 0 else 2, **unit)
            if levels == 0:
                blocks = [first, *(Unit(dim, dim, **unit) for _ in range(count - 1))]
            else:
                blocks = [first, *(AttentionModule(dim, levels=levels, **unit) for _ in range(count))]
            self.add_module(f"layer{i + 1}", MapBlocks(*blocks))
            info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"layer{i + 1}"})
            before = dim
        self._build_head(
            feature_info=info,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=MapNormAct,
            stage_norms=False,
            dd=dd,
        )
        self.proj_drop = nn.Dropout(proj_drop_rate)
        self.init_weights(needs_reset=False)

    def _enter(self, index: int, x: Tensor) -> Tensor:
        return self.maxpool(self.norm1(self.conv1(x))).permute(0, 2, 3, 1) if index == 0 else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map to logits `[B, num_classes]`, or to pooled features `[B, head_hidden_size]` with `pre_logits`."""
        return super().forward_head(self.proj_drop(x), pre_logits)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that order parameters by depth (layer decay, freezing)."""
        fine = [(r"^layer(\d+)\.(\d+)", None), (r"^norm\.", (99999,))]
        return {"stem": r"^(?:conv|norm)1", "blocks": r"^layer(\d+)" if coarse else fine}


ABOUT = "Residual attention network, {}; no weights are published."
NET = ResidualAttentionNet
MODELS = {
    "ran_56": Model(ABOUT.format("Attention-56"), NET, {"depths": (1, 1, 1, 3)}),
    "ran_92": Model(ABOUT.format("Attention-92"), NET, {"depths": (1, 2, 3, 3)}),
    "ran_pico": Model(
        "Three stages for 32x32 single-channel images (handwritten digits).",
        NET,
        {"depths": (1, 1, 1), "embed_dim": 8},
    ),
    "test_ran": Model("Residual attention network for tests.", NET, {"depths": (1, 2), "embed_dim": 4}),
}
register_family(
    __name__,
    MODELS,
    cfg={"interpolation": "bilinear", "paper_ids": "arXiv:1704.06904"},
    cfgs={"ran_pico.untrained": DIGITS_CFG},
    leaves=(MapNormAct,),
)
