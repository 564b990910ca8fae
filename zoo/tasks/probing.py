"""Probing: how much the features of a frozen model know, by a linear or attentive head and by nearest neighbours.

Everything but the head and the frozen trunk is as in `ClassificationTask`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from ..data.loader import PADDING
from ..heads.attach import attach_head, predict_by_neighbors
from ._base import Task
from .classification import Batch, ClassificationTask
from .model import make_model


class ProbingTask(ClassificationTask):
    """Trains a head on the features of a timm model; arguments as in `ClassificationTask`, and

    Args:
        head: arguments of `attach_head`: `name` ("linear" or "ep"), `freeze`, `layer`, `tokens`, `norm`, `queries`, ….
        neighbors: number of nearest neighbours that classify, too, logged as `val/knn` and `test/knn`; they are looked
            for among the mean patch tokens of the newest epoch of training, by each device among its own. 0: none.
    """

    def __init__(self, *, head: Mapping[str, Any], neighbors: int = 0, **options: Any):
        super().__init__(**options)
        self.save_hyperparameters(ignore=["targets"])
        self.head_cfg, self.neighbors = dict(head), neighbors
        if "name" not in self.head_cfg:
            raise ValueError(f"task.head={self.head_cfg} must name a head: linear or ep")
        if neighbors:
            for split in ("val", "test"):
                self.metrics[f"{split}_knn"] = MulticlassAccuracy(self.num_classes, average="micro")
        self._memory: list[tuple[Tensor, Tensor]] = []

    def make_model(self) -> nn.Module:
        pretrained = self.model_cfg.get("pretrained", False)
        trunk = make_model(
            self.model_cfg, num_classes=0, in_chans=self.in_chans, img_size=self.img_size, pretrained=pretrained
        )
        options = dict(self.head_cfg)
        return attach_head(trunk, options.pop("name"), self.num_classes, **options)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._memory.clear()

    def training_loss(self, batch: Batch) -> Tensor:
        if self.neighbors and self.training:
            self._memory.append((self._mean_feature(batch[0]), batch[1]))
        return super().training_loss(batch)

    def evaluate(self, split: str, batch: Batch, batch_idx: int) -> Any:
        if self.neighbors and self._memory:
            memory, labels = (torch.cat(x) for x in zip(*self._memory, strict=True))
            known = batch[1] != PADDING
            votes = predict_by_neighbors(
                self._mean_feature(batch[0]), memory, labels, self.num_classes, k=self.neighbors
            )
            self.metrics[f"{split}_knn"].update(votes[known], batch[1][known])  # pyright: ignore
        return super().evaluate(split, batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        Task.on_save_checkpoint(self, checkpoint)  # no model of timm can be built from a trunk and a head

    @torch.no_grad()
    def _mean_feature(self, images: Tensor) -> Tensor:
        assert self.model is not None
        return self.model.features(images)[0].mean(1)
