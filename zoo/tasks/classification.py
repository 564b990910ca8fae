"""Image classification with timm's models, optimizers, schedulers and mixup.

Random numbers of a training step are those of dropout, drop path and mixup; `Task` seeds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from ..data.foreign import reason
from ..data.loader import PADDING, seeded
from ..data.names import say, unknown_name
from .epochs import EpochTask
from .losses import ClassLoss, balanced_weights, check_loss
from .model import make_model
from .portable import describe_model
from .tuning import check_tuning, freeze_statistics, merge_lora, set_trainable, tune

Batch = tuple[Tensor, Tensor]


def _check_name(model: str) -> None:
    if not model.startswith(("hf-hub:", "local-dir:")) and not timm.is_model(model.split(".")[0]):
        raise unknown_name("model.name", model, timm.list_models())


class ClassificationTask(EpochTask):
    """Trains a timm model on `(images [B, C, H, W], targets [B] int64)`.

    Args:
        model: `name` of a timm model, optional `pretrained`, `args` (further arguments of `timm.create_model`) and
            `use_kernels` (put its window attention on our kernels, see `foveal.zoo.use_kernels`).
        num_classes, in_chans: of the data.
        img_size: pixels a side of the data, for models that are made for one size; None: the model's own.
        class_names: of the data, by label; kept in checkpoints under `hyper_parameters`.
        optimizer, scheduler, lr_batch: see `EpochTask`. The model's `no_weight_decay()` is obeyed.
        label_smoothing: 0 to 1.
        loss: "ce", "bce" or "focal"; see `losses.ClassLoss`.
        focal_gamma: of the focal loss.
        class_weights: one for each class; "balanced": in inverse proportion to its training images; None: all 1.
        tuning: "full", "probe" (the classifier alone; no gradients of the others are computed) or "lora"; see
            `tuning.tune`.
        unfreeze_epoch: with "probe", the epoch, from 0, at which everything begins to train.
        lora: with "lora", `rank`, `alpha`, `dropout`, `targets`.
        mixup: arguments of `timm.data.Mixup` (`mixup_alpha`, `cutmix_alpha`, `prob`, `switch_prob`, `mode`); None: off.
        compile: `enabled`, `mode` and `fullgraph` for `torch.compile` of each repeated block.
        seed: of the run.

    Raises:
        ValueError: an unknown model, optimizer or scheduler; the nearest names are in the message.
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
        mixup: Mapping[str, Any] | None = None,
        compile: Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        _check_name(model["name"])
        check_loss(loss, focal_gamma, class_weights, num_classes)
        check_tuning(tuning, unfreeze_epoch, lora)
        metrics: dict[str, Metric] = {}
        for split in ("val", "test"):
            metrics[f"{split}_loss"] = MeanMetric()
            for k in (1, 5) if num_classes > 5 else (1,):
                metrics[f"{split}_acc{k}"] = MulticlassAccuracy(num_classes, top_k=k, average="micro")
        super().__init__(
            metrics=metrics, optimizer=optimizer, scheduler=scheduler, lr_batch=lr_batch, compile=compile, seed=seed
        )
        self.save_hyperparameters()
        self.model_cfg, self.num_classes, self.in_chans, self.img_size = dict(model), num_classes, in_chans, img_size
        self.label_smoothing = label_smoothing
        self.tuning, self.unfreeze_epoch, self.lora = tuning, unfreeze_epoch, dict(lora or {})
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

    def setup(self, stage: str) -> None:
        """Check what data, devices and options have to agree on, and keep the names of the classes.

        Raises:
            ValueError: batches of an odd size, which cannot be mixed in pairs; balanced weights of data that do not
                know how many images a class has; unfreezing on several devices.
        """
        data = getattr(self.trainer, "datamodule", None)
        self._padded = not getattr(data, "shuffle", True)
        names = getattr(data, "class_names", None)
        if names is not None:  # some data know their classes only when they are opened
            self.hparams["class_names"] = list(names)
        batch = getattr(data, "batch_size", None)
        if stage == "fit" and self.mixup is not None and batch is not None and batch % 2:
            raise ValueError(f"data.batch_size={batch} must be even with task.mixup, which mixes images in pairs")

        if stage == "fit" and self.class_weights == "balanced":
            counts = getattr(data, "class_counts", None)
            if counts is None:
                raise ValueError("task.class_weights=balanced: these data do not know how many images a class has")
            self.loss.weights = torch.tensor(balanced_weights(counts))
        if stage == "fit" and self.unfreeze_epoch is not None and self.trainer.world_size > 1:
            raise ValueError(
                f"task.unfreeze_epoch={self.unfreeze_epoch} works on one device: gradients that begin later are not "
                "summed over several; train twice, and begin with model.name=local-dir:FOLDER"
            )

    def make_model(self) -> nn.Module:
        model = make_model(
            self.model_cfg,
            num_classes=self.num_classes,
            in_chans=self.in_chans,
            img_size=self.img_size,
            pretrained=self.model_cfg.get("pretrained", False),
        )
        return tune(model, self.tuning, self.lora)

    def configure_optimizers(self):
        if self.unfreeze_epoch is None:
            return super().configure_optimizers()
        assert self.model is not None
        set_trainable(self.model, "full")  # the optimizer holds all, and passes over those without a gradient
        made = super().configure_optimizers()
        set_trainable(self.model, self.tuning)
        return made

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.tuning != "probe":
            return
        assert self.model is not None
        frozen = self.unfreeze_epoch is None or self.current_epoch < self.unfreeze_epoch
        if frozen:
            freeze_statistics(self.model)
        else:
            set_trainable(self.model, "full")
            self.model.train()

    def on_fit_start(self) -> None:
        """Weights that were trained on other pixels than the data give are worse than they need to be."""
        assert self.model is not None
        known = (self.model_cfg.get("pretrained") and getattr(self.model, "pretrained_cfg", None)) or {}
        data = getattr(self.trainer, "datamodule", None)
        for key in ("mean", "std"):
            ours, theirs = getattr(data, key, None), known.get(key)
            if ours and theirs and len(ours) == len(theirs) and not np.allclose(ours, theirs, atol=1e-3):
                say(f"{self.model_cfg['name']} was pretrained with data.{key}={list(theirs)}, not {list(ours)}")

    def forward(self, images: Tensor) -> Tensor:
        """`[B, C, H, W]` → logits `[B, num_classes]`, in float32 whatever the precision of the model."""
        assert self.model is not None
        return self.model(images).float()

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
        return self.loss(self(images), targets)

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.tuning == "lora":
            checkpoint["state_dict_ema"] = merge_lora(checkpoint["state_dict_ema"], self.lora)
        describe_model(self, checkpoint)
