"""ImageTask: a timm model on images, whole or in part; a task adds targets, loss and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import timm
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from ..data.names import say, unknown_name
from ..prompts import matching_loss, prompts_of
from .epochs import EpochTask
from .model import make_model
from .portable import describe_model
from .tuning import check_tuning, freeze_statistics, merge_lora, set_trainable, tune

TASK_OF = {
    "class": "classification",
    "labels": "multilabel",
    "values": "regression",
    "masks": "segmentation",
}  # by the targets of the data


def _check_name(model: str) -> None:
    if not model.startswith(("hf-hub:", "local-dir:")) and not timm.is_model(model.split(".")[0]):
        raise unknown_name("model.name", model, timm.list_models())


class ImageTask(EpochTask):
    """Trains a timm model on `(images [B, C, H, W], targets)`; a subclass has the loss, and saves hyperparameters.

    Args:
        model: `name` of a timm model, optional `pretrained`, `args` (further arguments of `timm.create_model`) and
            `use_kernels` (put its window attention on our kernels, see `foveal.zoo.use_kernels`).
        num_classes: outputs of the model: classes, labels or values of the data.
        in_chans: of the data.
        img_size: pixels a side of the data, for models that are made for one size; None: the model's own.
        targets: of the data: "class", "labels" or "values".
        tuning: "full", "probe" (the classifier alone; no gradients of the others are computed), "lora" or "prompt";
            see `tuning.tune`.
        unfreeze_epoch: with "probe", the epoch, from 0, at which everything begins to train.
        lora: with "lora", `rank`, `alpha`, `dropout`, `targets`.
        prompt: with "prompt", `kind` and further arguments of `foveal.zoo.prompts.add_prompts`; `weight` of the loss
            that draws tokens and keys of "tcpa" together, and `random_epochs`, in which they are matched at random.
        options: see `EpochTask`. The model's `no_weight_decay()` is obeyed.

    Raises:
        ValueError: an unknown model, optimizer or scheduler (the nearest names are in the message), or data with
            targets of another kind.
    """

    targets = "class"

    def __init__(
        self,
        *,
        model: Mapping[str, Any],
        num_classes: int,
        in_chans: int = 3,
        img_size: int | None = None,
        targets: str = "class",
        tuning: str = "full",
        unfreeze_epoch: int | None = None,
        lora: Mapping[str, Any] | None = None,
        prompt: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        _check_name(model["name"])
        if targets != self.targets:
            raise ValueError(
                f"data.targets={targets} needs task={TASK_OF[targets]}; task={TASK_OF[self.targets]} trains on "
                f"data.targets={self.targets}"
            )
        check_tuning(tuning, unfreeze_epoch, lora, prompt)
        metrics = {f"{split}_loss": MeanMetric() for split in ("val", "test")}
        for split in ("val", "test"):
            metrics |= {f"{split}_{name}": metric for name, metric in self.make_metrics(num_classes).items()}
        super().__init__(metrics=metrics, **options)
        self.model_cfg, self.num_classes, self.in_chans, self.img_size = dict(model), num_classes, in_chans, img_size
        self.tuning, self.unfreeze_epoch, self.lora = tuning, unfreeze_epoch, dict(lora or {})
        self.prompt = dict(prompt or {})
        self.match_weight = self.prompt.pop("weight", 0.01)
        self.random_epochs = self.prompt.pop("random_epochs", 0)

    def make_metrics(self, num_classes: int) -> dict[str, Metric]:
        """Metrics of a split by name, beside the loss."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Keep the names of the classes.

        Raises:
            ValueError: unfreezing on several devices.
        """
        names: Sequence[str] | None = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if names is not None:  # some data know their classes only when they are opened
            self.hparams["class_names"] = list(names)
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
        return tune(model, self.tuning, self.lora, self.prompt)

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
        if self.tuning not in ("probe", "prompt"):
            return
        assert self.model is not None
        for prompts in prompts_of(self.model):
            prompts.random = self.current_epoch < self.random_epochs
        frozen = self.unfreeze_epoch is None or self.current_epoch < self.unfreeze_epoch
        if frozen:
            freeze_statistics(self.model)
        else:
            set_trainable(self.model, "full")
            self.model.train()

    def with_matching(self, loss: Tensor) -> Tensor:
        """The loss of a step, with prompts also what draws tokens and keys together."""
        return loss + self.match_weight * matching_loss(self.model) if self.tuning == "prompt" else loss

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
        """`[B, C, H, W]` → outputs `[B, num_classes]`, in float32 whatever the precision of the model."""
        assert self.model is not None
        return self.model(images).float()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.tuning == "lora":
            checkpoint["state_dict_ema"] = merge_lora(checkpoint["state_dict_ema"], self.lora)
        describe_model(self, checkpoint)
