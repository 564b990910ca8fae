"""Scenes with several labels, seen in glimpses that a canvas keeps together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MultilabelAveragePrecision

from ..heads.glimpses import GlimpseClassifier
from .epochs import EpochTask
from .model import told_as


class GlimpseTask(EpochTask):
    """Trains `GlimpseClassifier` on `(images [B, C, H, W], labels [B, labels])`; rows of NaN do not count.

    The loss is the mean over glimpses of the binary cross-entropy. `map` is the mean over labels of the average
    precision after the last glimpse, `map_first` that after the first.

    Args:
        canvas: arguments of `GlimpseClassifier`.
        num_classes, in_chans: of the data.
        optimizer, scheduler, lr_batch, compile, seed: as in `EpochTask`.

    Raises:
        ValueError: arguments that the model does not take.
    """

    progress_metric = "val_map"

    def __init__(self, *, canvas: Mapping[str, Any], num_classes: int, in_chans: int, **options: Any):
        metrics: dict[str, Metric] = {}
        for split in ("val", "test"):
            metrics[f"{split}_loss"] = MeanMetric()
            metrics |= {f"{split}_{name}": MultilabelAveragePrecision(num_classes) for name in ("map", "map_first")}
        super().__init__(metrics=metrics, **options)
        self.save_hyperparameters()
        self.canvas_cfg, self.num_classes, self.in_chans = dict(canvas), num_classes, in_chans

    def make_model(self) -> nn.Module:
        with told_as("task.canvas", self.canvas_cfg):
            return GlimpseClassifier(self.num_classes, in_chans=self.in_chans, **self.canvas_cfg)

    @staticmethod
    def _loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels[:, None].expand_as(logits))

    def training_loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return self._loss(self.model(images).float(), labels)

    def evaluate(self, split: str, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        real = ~labels.isnan().any(dim=1)
        if not real.any():
            return
        logits = self.model(images, generator=torch.Generator().manual_seed(batch_idx)).float()[real]
        self.metrics[f"{split}_loss"].update(self._loss(logits, labels[real]), weight=real.sum())  # pyright: ignore
        for name, place in (("map", -1), ("map_first", 0)):
            self.metrics[f"{split}_{name}"].update(logits[:, place].sigmoid(), labels[real].long())  # pyright: ignore
