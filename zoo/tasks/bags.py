"""Bags of instances with one label each: multiple-instance learning, as for slides that are cut into patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score

from ...layers.bags import BAG_HEADS, attention_measures
from ...layers.pooling import HeadOutput
from ..data.loader import PADDING
from ..data.names import say, unknown_name
from .epochs import EpochTask
from .losses import ClassLoss, balanced_weights, check_loss
from .model import make_model

UNIFORM = 0.98  # share of the largest entropy from which attention tells instances apart no longer


class BagModel(nn.Module):
    """A head of bags on features of their instances.

    A frozen trunk has no gradients and stays in evaluation mode.

    Args:
        trunk: from images `[n, C, H, W]` to features `[n, dim]`; None: instances are flattened.
        head: takes `[B, N, dim]` and a mask.
        freeze: the trunk.
    """

    def __init__(self, trunk: nn.Module | None, head: nn.Module, *, freeze: bool):
        super().__init__()
        self.trunk, self.head, self.freeze = trunk, head, freeze
        if trunk is not None and freeze:
            trunk.requires_grad_(False)
            trunk.eval()

    def train(self, mode: bool = True) -> BagModel:
        """Set the mode of the head, and of a trunk that learns."""
        super().train(mode)
        if self.trunk is not None and self.freeze:
            self.trunk.eval()
        return self

    def features(self, instances: Tensor, mask: Tensor) -> Tensor:
        """Features of instances `[B, N, …]`, `[B, N, dim]`; zero where none is there."""
        if self.trunk is None:
            return instances.flatten(2)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            found = self.trunk(instances[mask])
        return found.new_zeros(*mask.shape, found.shape[1]).masked_scatter(mask[..., None], found)

    def forward(self, instances: Tensor, mask: Tensor) -> HeadOutput:
        """Bags `[B, N, …]` to logits and attention of their instances."""
        return self.head(self.features(instances, mask), mask=mask)


def _make_metrics(num_classes: int, *, attends: bool, marked: bool) -> dict[str, Metric]:
    """Metrics of a split by name; see `BagTask`."""
    made: dict[str, Metric] = {
        "loss": MeanMetric(),
        "acc1": MulticlassAccuracy(num_classes, average="micro"),
        "auroc": MulticlassAUROC(num_classes),
        "f1": MulticlassF1Score(num_classes),
    }
    if attends:
        made |= {name: MeanMetric() for name in ("entropy", "top")}
    return made | ({"instance_auroc": BinaryAUROC()} if marked else {})


class BagTask(EpochTask):
    """Trains a head on `(instances [B, N, …], labels [B], mask [B, N])`, with marks of instances `[B, N]` if there are.

    Measured are accuracy (`acc1`), `auroc` (mean over classes, one against the others) and `f1` (mean over classes); of
    attention the entropy as a share of its largest value (`entropy`) and the mass of the heaviest twentieth of the
    instances (`top`); and `instance_auroc`, how well attention finds the marked instances of bags that have some.
    Attention of nearly equal weights is warned of.

    Args:
        head: `name` ("mean", "abmil", "acmil" or "spa", see `foveal.layers.bags`) and its arguments.
        trunk: of images: `name` of a timm model, `pretrained`, `args`, and `freeze` (true when left out); None: pixels
            or features as they are.
        mark_weight: weight of the loss between marks and the gate of "spa"; 0: bags alone.
        num_classes, class_names, instance, marked: of the data.
        loss, focal_gamma, label_smoothing, class_weights: as in `ClassificationTask`, by bags.
        optimizer, scheduler, lr_batch, compile, seed: as in `EpochTask`.

    Raises:
        ValueError: an unknown head, a head or trunk that does not take its arguments, a trunk for features.
    """

    progress_metric = "val_auroc"

    def __init__(
        self,
        *,
        head: Mapping[str, Any],
        trunk: Mapping[str, Any] | None = None,
        mark_weight: float = 0.0,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        instance: Sequence[int],
        marked: bool = False,
        loss: str = "ce",
        focal_gamma: float = 2.0,
        label_smoothing: float = 0.0,
        class_weights: str | Sequence[float] | None = None,
        **options: Any,
    ):
        if head.get("name") not in BAG_HEADS:
            raise unknown_name("task.head.name", str(head.get("name")), BAG_HEADS)
        if trunk is not None and len(instance) != 3:
            raise ValueError(f"task.trunk={dict(trunk)} needs images, and the data have features of {instance[0]}")
        if mark_weight and (head["name"] != "spa" or not marked):
            raise ValueError(
                f"task.mark_weight={mark_weight} is of task.head.name=spa, whose gate selects instances, and of data "
                "that mark some"
            )
        check_loss(loss, focal_gamma, class_weights, num_classes)
        attends = head["name"] != "mean"
        metrics: dict[str, Metric] = {}
        for split in ("val", "test"):
            made = _make_metrics(num_classes, attends=attends, marked=attends and marked)
            metrics |= {f"{split}_{name}": metric for name, metric in made.items()}
        super().__init__(metrics=metrics, **options)
        self.save_hyperparameters()
        self.head_cfg, self.trunk_cfg, self.mark_weight = dict(head), dict(trunk or {}), mark_weight
        self.num_classes, self.instance, self.class_weights = num_classes, tuple(instance), class_weights
        given = None if class_weights in (None, "balanced") else list(class_weights)
        self.loss = ClassLoss(loss, num_classes, gamma=focal_gamma, weights=given, smoothing=label_smoothing)
        self._warned = False

    def setup(self, stage: str) -> None:
        """Weigh the classes."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and self.class_weights == "balanced":
            self.loss.weights = torch.tensor(balanced_weights(data.class_counts))

    def make_model(self) -> nn.Module:
        trunk, width = None, math.prod(self.instance)
        if self.trunk_cfg:
            channels, _, size = self.instance
            config = {name: x for name, x in self.trunk_cfg.items() if name != "freeze"}
            pretrained = config.get("pretrained", False)
            trunk = make_model(config, num_classes=0, in_chans=channels, img_size=size, pretrained=pretrained)
            width = trunk.num_features
        options = {name: x for name, x in self.head_cfg.items() if name != "name"}
        try:
            head = BAG_HEADS[self.head_cfg["name"]](width, self.num_classes, **options)
        except TypeError as error:
            raise ValueError(f"task.head={self.head_cfg} does not work: {error}") from error
        return BagModel(trunk, head, freeze=self.trunk_cfg.get("freeze", True))

    def training_loss(self, batch: Any) -> Tensor:
        instances, labels, mask, *marks = batch
        extra: dict[str, Tensor] = {}
        if self.mark_weight:
            extra["marks"] = marks[0]
        features = self.model.features(instances, mask)
        losses = self.model.head.losses(features, labels, mask=mask, loss=self.loss, **extra)
        if self.mark_weight:
            losses["gate"] = self.mark_weight * losses["gate"]
        return torch.stack([x.float() for x in losses.values()]).sum()

    def evaluate(self, split: str, batch: Any, batch_idx: int) -> HeadOutput:
        """Returns logits and attention, which the report draws."""
        instances, labels, mask, *marks = batch
        output = self.model(instances, mask)
        logits, real = output.logits.float(), labels != PADDING
        if not real.any():
            return output
        metrics: Any = {name: m for name, m in self.metrics.items() if name.startswith(f"{split}_")}
        metrics[f"{split}_loss"].update(self.loss(logits[real], labels[real], plain=True), weight=real.sum())
        for name in ("acc1", "auroc", "f1"):
            metrics[f"{split}_{name}"].update(logits[real], labels[real])
        if output.attention is not None:
            weights = output.attention.float().mean(1)  # of all branches
            for name, x in zip(("entropy", "top"), attention_measures(weights, mask), strict=True):
                metrics[f"{split}_{name}"].update(x[real])
            with_marks = (real & marks[0].any(1)).nonzero()[:, 0] if marks else ()
            for i in with_marks:
                metrics[f"{split}_instance_auroc"].update(weights[i][mask[i]], marks[0][i][mask[i]].long())
        return output

    def on_validation_epoch_end(self) -> None:
        """Say once that attention does not choose."""
        if self._warned or self.trainer.sanity_checking or "val_entropy" not in self.metrics:
            return
        metric: Any = self.metrics["val_entropy"]
        share = float(metric.compute())
        if share >= UNIFORM and 4 * (self.current_epoch + 1) >= (self.trainer.max_epochs or 0):  # it begins so
            self._warned = True
            say(
                f"attention weighs the instances of the bags nearly alike (entropy {share:.3f} of its largest value): "
                "the bags are classified by a mean; try another learning rate, other features, or task.head.name=abmil"
            )
