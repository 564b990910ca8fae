"""The layouts of ResNet (arXiv:1512.03385) and MobileNetV2 (arXiv:1801.04381), whose residual branches end in a gate.

Blocks are timm's and torchvision's.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv
from torch import Tensor, nn
from torchvision.models import MobileNetV2
from torchvision.models.mobilenetv2 import InvertedResidual

from .base import Backbone, NumberedHost
from .blocks import Blocks

MOBILE_STAGES = (2, 2, 3, 7, 5)  # layers of torchvision's MobileNetV2 by resolution, 1/2 to 1/32


class ChannelsFirst(nn.Module):
    """A layer of `[B, H, W, dim]`, on `[B, dim, H, W]`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvolutionalBackbone(Backbone):
    """A backbone whose convolutions have normal weights, spread by what they hand on (arXiv:1502.01852)."""

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """As in `Backbone`, then all convolutions."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class MapBlocks(Blocks):
    """Blocks of `[B, dim, H, W]`, on `[B, H, W, dim]`."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class GatedResNet(ConvolutionalBackbone, NumberedHost):
    """ResNet with a gate at the end of each residual branch, for images of any size.

    Args:
        gate: makes the gate of a block, a layer of `[B, H, W, dim]`, by `gate(dim, **options)`: `proj_drop`,
            `device`, `dtype` and those of `gate_options`.
        depths: blocks of each stage.
        block: "basic" with two 3x3 convolutions, or "bottleneck".
        embed_dim: channels of the stem; stages have as many, twice as many, …, times 4 with bottlenecks.
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and of the gates, stochastic depth (its rate
            grows linearly to this value).
        gate_options: further arguments of `gate`.
    """

    stages_name: ClassVar[str] = "layer{}"
    first_conv: ClassVar[str] = "conv1"

    def __init__(
        self,
        *,
        gate: Callable[..., nn.Module],
        depths: Sequence[int],
        block: Literal["basic", "bottleneck"] = "basic",
        embed_dim: int = 64,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **gate_options: Any,
    ):
        super().__init__()
        if block not in ("basic", "bottleneck"):
            raise ValueError(f"block={block!r} must be 'basic' or 'bottleneck'")
        dd = {"device": device, "dtype": dtype}
        block_cls: Any = BasicBlock if block == "basic" else Bottleneck

        def gate_of(dim: int, **unused: Any) -> nn.Module:
            return ChannelsFirst(gate(dim, proj_drop=proj_drop_rate, **gate_options, **dd))

        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.conv1 = nn.Conv2d(in_chans, embed_dim, 7, stride=2, padding=3, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(embed_dim, **dd)
        self.act1 = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        before, info = embed_dim, []
        for i, depth in enumerate(depths):
            width, stride, blocks = embed_dim * 2**i, 1 if i == 0 else 2, []
            after = width * block_cls.expansion
            for j in range(depth):
                options = {"stride": stride if j == 0 else 1, "drop_path": DropPath(next(rates)), "attn_layer": gate_of}
                if j == 0 and (stride > 1 or before != after):
                    options["downsample"] = downsample_conv(before, after, kernel_size=1, stride=stride, **dd)
                blocks.append(block_cls(before if j == 0 else after, width, **options, **dd))
            self.add_module(f"layer{i + 1}", MapBlocks(*blocks))
            info.append({"num_chs": after, "reduction": 4 * 2**i, "module": f"layer{i + 1}"})
            before = after
        self._build_head(
            feature_info=info,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=nn.Identity,
            stage_norms=False,
            dd=dd,
        )
        self.init_weights(needs_reset=False)

    def _enter(self, index: int, x: Tensor) -> Tensor:
        if index > 0:
            return x
        return self.maxpool(self.act1(self.bn1(self.conv1(x)))).permute(0, 2, 3, 1)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that order parameters by depth (layer decay, freezing)."""
        fine = [(r"^layer(\d+)\.(\d+)", None)]
        return {"stem": r"^(?:conv|bn)1", "blocks": r"^layer(\d+)" if coarse else fine}


class GatedMobileNetV2(ConvolutionalBackbone):
    """MobileNetV2 with a gate at the end of each block, for images of any size.

    Args:
        gate, gate_options: as in `GatedResNet`.
        width: multiplier of the channels.
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        drop_rate, proj_drop_rate: dropout before the head and of the gates.
        drop_path_rate: stochastic depth (its rate grows linearly to this value).
    """

    stages_name: ClassVar[str] = "stages"
    first_conv: ClassVar[str] = "stages.0.0.0"

    def __init__(
        self,
        *,
        gate: Callable[..., nn.Module],
        width: float = 1.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **gate_options: Any,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        with nullcontext() if device is None else torch.device(device):
            layers = list(MobileNetV2(width_mult=width).features.to(dtype=dtype))
        stem: Any = layers[0]
        stem[0] = nn.Conv2d(in_chans, stem[0].out_channels, 3, stride=2, padding=1, bias=False, **dd)
        rates = calculate_drop_path_rates(drop_path_rate, len(layers))
        for layer, rate in zip(layers, rates, strict=True):
            if isinstance(layer, InvertedResidual):
                made = gate(layer.out_channels, proj_drop=proj_drop_rate, **gate_options, **dd)
                layer.conv.append(ChannelsFirst(made))
                layer.conv.append(DropPath(rate) if layer.use_res_connect else nn.Identity())
        ends = list(accumulate(MOBILE_STAGES))
        self.stages = nn.Sequential(
            *(MapBlocks(*layers[end - n : end]) for n, end in zip(MOBILE_STAGES, ends, strict=True))
        )
        channels = [layers[end - 1].out_channels for end in ends[:-1]] + [layers[-1][0].out_channels]
        self._build_head(
            feature_info=[
                {"num_chs": dim, "reduction": 2 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(channels)
            ],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=nn.Identity,
            stage_norms=False,
            dd=dd,
        )
        self.init_weights(needs_reset=False)

    def _enter(self, index: int, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1) if index == 0 else x

    def _truncate(self, last: int) -> None:
        self.stages = self.stages[: last + 1]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that order parameters by depth (layer decay, freezing)."""
        return {"stem": r"^stages\.0\.0", "blocks": r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None)]}
