"""Segmenter: a backbone that gives maps, and `PyramidHead`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .head import PyramidHead


class Segmenter(nn.Module):
    """Class logits of every pixel.

    Args:
        backbone: of `timm.create_model(..., features_only=True)`.
        num_classes: of the logits.
        pad_to: images are padded by zeros at the right and at the bottom to a multiple of so many pixels, for backbones
            that take no other sizes.
        head: arguments of `PyramidHead`.

    Raises:
        ValueError: pad_to below 1.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, *, pad_to: int = 1, **head: Any):
        super().__init__()
        if pad_to < 1:
            raise ValueError(f"pad_to={pad_to} must be at least 1")
        self.backbone, self.num_classes, self.pad_to = backbone, num_classes, pad_to
        info: Any = backbone.feature_info
        self.head = PyramidHead(info.channels(), num_classes, **head)
        self.channels_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"

    def get_classifier(self) -> nn.Module:
        """The head, which `task.tuning=probe` trains alone."""
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        """`[B, C, H, W]` of any size → `[B, num_classes, H, W]`."""
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % self.pad_to, 0, -height % self.pad_to))
        maps = self.backbone(images)
        if self.channels_last:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        logits = F.interpolate(self.head(maps), size=images.shape[2:], mode="bilinear", align_corners=False)
        return logits[:, :, :height, :width]
