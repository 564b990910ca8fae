"""Images with any number of labels: each label is a yes or no of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score

from ..data.names import unknown_name
from .image import ImageTask
from .losses import LabelLoss

Batch = tuple[Tensor, Tensor]
LOSSES = ("bce", "focal")


class MultiLabelTask(ImageTask):
    """Trains a timm model on `(images [B, C, H, W], targets [B, labels])`, 1 for the labels that an image has.

    `map` is the mean over labels of the average precision, `f1` that of F1 at the probability 0.5.

    Args:
        class_names: of the data, by label; kept in checkpoints under `hyper_parameters`.
        loss: "bce" or "focal", see `losses.LabelLoss`.
        focal_gamma: of the focal loss.
        class_weights: one for each label: how much its images with the label count; "balanced": as many times as there
            are images without the label for one with it, of those to train on; None: 1.
        options: see `ImageTask`.

    Raises:
        ValueError: as `ImageTask`; an unknown loss, or weights that do not fit.
    """

    targets = "labels"
    progress_metric = "val_map"

    def __init__(
        self,
        *,
        model: Mapping[str, Any],
        num_classes: int,
        class_names: Sequence[str] | None = None,
        loss: str = "bce",
        focal_gamma: float = 2.0,
        class_weights: str | Sequence[float] | None = None,
        **options: Any,
    ):
        if loss not in LOSSES:
            raise unknown_name("task.loss", loss, LOSSES)
        given = None
        if class_weights is not None and class_weights != "balanced":
            given = [] if isinstance(class_weights, str) else [float(weight) for weight in class_weights]
            if len(given) != num_classes or min(given) <= 0:
                raise ValueError(
                    f"task.class_weights={class_weights!r} must be balanced, or {num_classes} numbers above 0, one for "
                    "each label"
                )
        if not focal_gamma >= 0:
            raise ValueError(f"task.focal_gamma={focal_gamma} must be 0 or more")
        super().__init__(model=model, num_classes=num_classes, **options)
        self.save_hyperparameters(ignore=["targets"])
        self.class_weights = class_weights
        self.loss = LabelLoss(gamma=focal_gamma if loss == "focal" else 0.0, weights=given)

    def make_metrics(self, num_classes: int) -> dict[str, Metric]:
        return {"map": MultilabelAveragePrecision(num_classes), "f1": MultilabelF1Score(num_classes)}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.class_weights == "balanced":
            self.loss.weights = self.trainer.datamodule.positive_weights  # pyright: ignore - set by the trainer

    def training_loss(self, batch: Batch) -> Tensor:
        images, targets = batch
        return self.with_matching(self.loss(self(images), targets))

    def evaluate(self, split: str, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the logits `[B, labels]`, which the report draws."""
        images, targets = batch
        logits = self(images)
        real = ~targets.isnan().any(dim=1)
        if real.any():
            self.metrics[f"{split}_loss"].update(self.loss(logits, targets, plain=True), weight=real.sum())  # pyright: ignore
            for name in ("map", "f1"):
                self.metrics[f"{split}_{name}"].update(logits[real].sigmoid(), targets[real].long())  # pyright: ignore
        return logits
