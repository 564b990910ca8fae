"""Triplet attention in ResNet and MobileNetV2: each residual branch ends in its gates (arXiv:2010.03045).

Images of any size go through.
"""

from functools import partial
from typing import Any

from torch import nn

from ...layers.triplet import TripletAttention2d
from ..builder import DIGITS_CFG, Model, register_family
from ..conversion import Conversion
from ..hosts.gated import MOBILE_STAGES, GatedMobileNetV2, GatedResNet


def triplet(dim: int, **options: Any) -> nn.Module:
    """The gate of a block, whatever its channels; see `foveal.layers.TripletAttention2d`."""
    return TripletAttention2d(**options)


RESNET, MOBILENET = partial(GatedResNet, gate=triplet), partial(GatedMobileNetV2, gate=triplet)


def official_names(model: nn.Module) -> list:
    """Renames of the official files; those of MobileNetV2 count layers over all resolutions."""
    places = [f"stages.{i}.{j}." for i, n in enumerate(MOBILE_STAGES) for j in range(n)]
    gate = r"(ChannelGateH|ChannelGateW|SpatialGate)\."
    return [
        (r"^features\.(\d+)\.", lambda match: places[int(match[1])]),
        (r"^fc\.|^classifier\.1\.", "head."),
        (rf"\.triplet_attention\.{gate}", r".se.layer.\1."),
        (rf"^(stages\..*)\.{gate}", r"\1.layer.\2."),
    ]


MODELS = {
    "triplet_resnet18": Model("ResNet-18 with triplet attention.", RESNET, {"depths": (2, 2, 2, 2)}),
    "triplet_resnet34": Model(
        "ResNet-34 with triplet attention; no weights are published.", RESNET, {"depths": (3, 4, 6, 3)}
    ),
    "triplet_resnet50": Model(
        "ResNet-50 with triplet attention.", RESNET, {"depths": (3, 4, 6, 3), "block": "bottleneck"}
    ),
    "triplet_resnet101": Model(
        "ResNet-101 with triplet attention; no weights are published.",
        RESNET,
        {"depths": (3, 4, 23, 3), "block": "bottleneck"},
    ),
    "triplet_mobilenetv2": Model("MobileNetV2 with triplet attention.", MOBILENET, {}),
    "triplet_resnet_pico": Model(
        "Three stages for 32x32 single-channel images (handwritten digits).",
        RESNET,
        {"depths": (1, 1, 1), "embed_dim": 24, "kernel_size": 3},
    ),
    "test_triplet_resnet": Model(
        "ResNet with triplet attention for tests.",
        RESNET,
        {"depths": (1, 2), "embed_dim": 16, "block": "bottleneck", "kernel_size": 3},
    ),
    "test_triplet_mobilenetv2": Model("MobileNetV2 with triplet attention for tests.", MOBILENET, {"width": 0.25}),
}
KERNEL_3 = {f"triplet_{name}.landskape_k3_in1k": {"kernel_size": 3} for name in ("resnet18", "resnet50", "mobilenetv2")}
CONVERSION = Conversion(rename=official_names)
MOBILE = {"pool_size": (7, 7)}
register_family(
    __name__,
    MODELS,
    conversion=CONVERSION,
    cfg={"interpolation": "bilinear", "paper_ids": "arXiv:2010.03045"},
    cfgs={
        "triplet_resnet_pico.untrained": DIGITS_CFG,
        "test_triplet_mobilenetv2.untrained": {"pool_size": (2, 2)},
        **{f"triplet_mobilenetv2.{tag}": MOBILE for tag in ("landskape_in1k", "landskape_k3_in1k", "untrained")},
    },
    checkpoint_args=KERNEL_3,
    leaves=(TripletAttention2d,),
)
