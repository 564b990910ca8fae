"""Style transfer: statistics of a style and places of a content, both measured on the features of a frozen encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...weights import load
from ..data.loader import PADDING
from ..restoration.stya2k import StyleTransfer, content_distance, local_distance, style_distance
from ._base import mean_metrics
from .epochs import EpochTask
from .model import told_as


class StyleTask(EpochTask):
    """Trains `StyleTransfer` on `(contents [B, C, H, W], styles [B, C, H, W], number)`.

    The loss is `style_weight` times the distance of the style's statistics, `local_weight` times that to attention
    without parameters, and `content_weight` times that to the content, which is 0 as published. `style` and `content`
    are distances of the results over those between content and style: a copy of the content has style 1 and content 0,
    a copy of the style the reverse.

    Args:
        network: arguments of `StyleTransfer`.
        encoder_weights: file with the keys of torchvision's or timm's VGG-19; None: random weights.
        style_weight, local_weight, content_weight: of the loss.
        in_chans: of the data.
        optimizer, scheduler, lr_batch, compile, seed: as in `EpochTask`.

    Raises:
        ValueError: arguments that the network does not take, or weights of another encoder.
    """

    progress_metric = "val_style"

    def __init__(
        self,
        *,
        network: Mapping[str, Any],
        encoder_weights: str | None = None,
        style_weight: float = 10.0,
        local_weight: float = 1.25,
        content_weight: float = 0.0,
        in_chans: int = 3,
        **options: Any,
    ):
        names = ("loss", "style", "content")
        super().__init__(metrics=mean_metrics(*names), **options)
        self.save_hyperparameters()
        self.network_cfg, self.encoder_weights, self.in_chans = dict(network), encoder_weights, in_chans
        self.weights = style_weight, local_weight, content_weight

    def make_model(self) -> nn.Module:
        with told_as("task.network", self.network_cfg):
            model = StyleTransfer(in_chans=self.in_chans, **self.network_cfg)
        if self.encoder_weights is not None:
            with told_as("task.encoder_weights", {"file": self.encoder_weights}):
                model.encoder.fill(load(self.encoder_weights))
        return model

    def names_matter(self) -> bool:
        return False

    def measure(self, batch: Any) -> dict[str, Tensor]:
        """Results of a batch by name: `loss`, distances, images."""
        model, (content, style) = self.model, batch[:2]
        with torch.no_grad():
            given, wanted = model.encoder(content), model.encoder(style)
        images = model.decode(given, wanted)
        found = model.encoder(images)
        near, far = style_distance(found, wanted), content_distance(found, given)
        parts = near, local_distance(found, given, wanted), far
        loss = torch.stack([weight * part for weight, part in zip(self.weights, parts, strict=True)]).sum()
        return {
            "loss": loss,
            "style": near / style_distance(given, wanted),
            "content": far / content_distance(wanted, given),
            "images": images,
        }

    def training_loss(self, batch: Any) -> Tensor:
        return self.measure(batch)["loss"]

    def evaluate(self, split: str, batch: Any, batch_idx: int) -> Any:
        batch = [x[batch[2] != PADDING] for x in batch]
        if not len(batch[0]):
            return None
        found = self.measure(batch)
        self.record(split, {name: found[name] for name in ("loss", "style", "content")}, weight=len(batch[0]))
        return {"content": batch[0], "style": batch[1], "result": found["images"]}
