"""Image classification with timm's models, optimizers, schedulers and mixup.

Random numbers of a training step are those of dropout, drop path and mixup; `Task` seeds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from ..data.foreign import reason
from ..data.loader import PADDING, seeded
from .image import ImageTask
from .losses import ClassLoss, balanced_weights, check_loss

Batch = tuple[Tensor, Tensor]


class ClassificationTask(ImageTask):
    """Trains a timm model on `(images [B, C, H, W], targets [B] int64)`.

    Args:
        model, num_classes, in_chans, img_size, targets, tuning, unfreeze_epoch, lora, prompt: see `ImageTask`.
        class_names: of the data, by label; kept in checkpoints under `hyper_parameters`.
        optimizer, scheduler, lr_batch: see `EpochTask`.
        label_smoothing: 0 to 1.
        loss: "ce", "bce" or "focal"; see `losses.ClassLoss`.
        focal_gamma: of the focal loss.
        class_weights: one for each class; "balanced": in inverse proportion to its training images; None: all 1.
        mixup: arguments of `timm.data.Mixup` (`mixup_alpha`, `cutmix_alpha`, `prob`, `switch_prob`, `mode`); None: off.
        compile: `enabled`, `mode` and `fullgraph` for `torch.compile` of each repeated block.
        seed: of the run.

    Raises:
        ValueError: as `ImageTask`; an unknown loss, or mixup that does not work.
    """

    progress_metric = "val_acc1"

    def __init__(
        self,
        *,
        model: Mapping[str, Any],
        num_classes: int,
        in_chans: int = 3,
        img_size: int | None = None,
        class_names: Sequence[str] | None = None,
        targets: str = "class",
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any] | None = None,
        lr_batch: int | None = None,
        label_smoothing: float = 0.0,
        loss: str = "ce",
        focal_gamma: float = 2.0,
        class_weights: str | Sequence[float] | None = None,
        tuning: str = "full",
        unfreeze_epoch: int | None = None,
        lora: Mapping[str, Any] | None = None,
        prompt: Mapping[str, Any] | None = None,
        mixup: Mapping[str, Any] | None = None,
        compile: Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        check_loss(loss, focal_gamma, class_weights, num_classes)
        super().__init__(
            model=model,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            targets=targets,
            tuning=tuning,
            unfreeze_epoch=unfreeze_epoch,
            lora=lora,
            prompt=prompt,
            optimizer=optimizer,
            scheduler=scheduler,
            lr_batch=lr_batch,
            compile=compile,
            seed=seed,
        )
        self.save_hyperparameters(ignore=["targets"])
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        given = None if class_weights in (None, "balanced") else list(class_weights)
        self.loss = ClassLoss(loss, num_classes, gamma=focal_gamma, weights=given, smoothing=label_smoothing)
        self.mixup, self._padded = None, False
        if mixup:
            try:
                self.mixup = Mixup(**mixup, label_smoothing=label_smoothing, num_classes=num_classes)  # pyright: ignore
                with seeded(seed):
                    self.mixup(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
            except (TypeError, ValueError, AssertionError) as error:
                raise ValueError(f"task.mixup={dict(mixup)} does not work: {reason(error)}") from error

    def make_metrics(self, num_classes: int) -> dict[str, Metric]:
        ranks = (1, 5) if num_classes > 5 else (1,)
        return {f"acc{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro") for k in ranks}

    def setup(self, stage: str) -> None:
        """Check what data, devices and options have to agree on, and keep the names of the classes.

        Raises:
            ValueError: batches of an odd size, which cannot be mixed in pairs; balanced weights of data that do not
                know how many images a class has; unfreezing on several devices.
        """
        data = getattr(self.trainer, "datamodule", None)
        self._padded = not getattr(data, "shuffle", True)
        batch = getattr(data, "batch_size", None)
        if stage == "fit" and self.mixup is not None and batch is not None and batch % 2:
            raise ValueError(f"data.batch_size={batch} must be even with task.mixup, which mixes images in pairs")

        if stage == "fit" and self.class_weights == "balanced":
            counts = getattr(data, "class_counts", None)
            if counts is None:
                raise ValueError("task.class_weights=balanced: these data do not know how many images a class has")
            self.loss.weights = torch.tensor(balanced_weights(counts))
        super().setup(stage)

    def _mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Images mixed in pairs with their soft targets `[B, num_classes]`. The last batch of file order or of a stream
        may be odd or padded: padding is left out, and an image without a partner stays as it is."""
        assert self.mixup is not None
        if self._padded:
            images, targets = images[targets != PADDING], targets[targets != PADDING]
        even = len(images) // 2 * 2
        if even == len(images):
            return self.mixup(images, targets)
        alone = mixup_target(targets[even:], self.num_classes, 1.0, self.label_smoothing)
        if not even:
            return images, alone
        mixed, soft = self.mixup(images[:even], targets[:even])
        return torch.cat([mixed, images[even:]]), torch.cat([soft, alone])

    def training_loss(self, batch: Batch) -> Tensor:
        images, targets = batch
        if self.mixup is not None:
            images, targets = self._mix(images, targets)
        return self.with_matching(self.loss(self(images), targets))

    def evaluate(self, split: str, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the logits `[B, num_classes]`, which the report draws."""
        images, targets = batch
        logits = self(images)
        real = targets != PADDING
        if real.any():
            loss = self.loss(logits[real], targets[real], plain=True)
            self.metrics[f"{split}_loss"].update(loss, weight=real.sum())  # pyright: ignore
            for name, metric in self.metrics.items():
                if name.startswith(f"{split}_acc"):
                    metric.update(logits[real], targets[real])  # pyright: ignore
        return logits
