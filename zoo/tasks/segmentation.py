"""Segmentation: a class for every pixel, by any backbone of timm that gives maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from ..data.foreign import reason
from ..data.loader import PADDING
from ..segmentation import Segmenter
from ._base import Task
from .image import ImageTask
from .losses import MaskLoss, check_mask_loss
from .model import make_model
from .tuning import merge_lora, tune

Batch = tuple[Tensor, Tensor]
HEAD = {"width": 256, "dropout": 0.1, "pad_to": 1}
CONFIG = "foveal_segmentation"  # key of a checkpoint that says how its model is made


def make_segmenter(
    model: Mapping[str, Any],
    *,
    num_classes: int,
    in_chans: int = 3,
    img_size: int | None = None,
    pretrained: bool = False,
    head: Mapping[str, Any] | None = None,
) -> Segmenter:
    """A backbone of timm by name, with a head.

    Args:
        model: `name`, `args` and `use_kernels`, see `tasks.model.make_model`; `out_indices` of `args` chooses maps.
        num_classes, in_chans, img_size: of the data.
        pretrained: load the weights of the backbone that timm knows for the name.
        head: `width` and `dropout` of `PyramidHead`, `pad_to` of `Segmenter`.

    Raises:
        ValueError: the model gives no maps, or the head does not take its arguments.
    """
    config = {**model, "args": {**(model.get("args") or {}), "features_only": True}}
    options = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size, "pretrained": pretrained}
    backbone = make_model(config, **options)
    unknown = set(head or {}) - set(HEAD)
    if unknown:
        raise ValueError(f"task.head={dict(head or {})} has {min(unknown)!r}; accepted are {', '.join(HEAD)}")
    try:
        return Segmenter(backbone, num_classes, **HEAD | dict(head or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"task.head={dict(head or {})}: {error}") from error


class SegmentationTask(ImageTask):
    """Trains a `Segmenter` on `(images [B, C, H, W], masks [B, H, W] int64)`, of which `PADDING` does not count.

    `miou` is the mean over classes of intersection over union, of the pixels of all images together; `acc` the share of
    pixels that are right.

    Args:
        class_names: of the data, by label; kept in checkpoints under `hyper_parameters`.
        head: `width` and `dropout` of `PyramidHead`, `pad_to` of `Segmenter`.
        loss: "ce", "dice" or "ce_dice", see `losses.MaskLoss`.
        class_weights: of the cross-entropy, one for each class; None: all 1.
        label_smoothing: of the cross-entropy, 0 to 1.
        options: see `ImageTask`; `tuning` "probe" trains the head alone.

    Raises:
        ValueError: as `ImageTask`; an unknown loss, or a model that gives no maps.
    """

    targets = "masks"
    progress_metric = "val_miou"

    def __init__(
        self,
        *,
        model: Mapping[str, Any],
        num_classes: int,
        class_names: Sequence[str] | None = None,
        head: Mapping[str, Any] | None = None,
        loss: str = "ce",
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        **options: Any,
    ):
        check_mask_loss(loss, class_weights, num_classes)
        super().__init__(model=model, num_classes=num_classes, **options)
        self.save_hyperparameters(ignore=["targets"])
        self.head_cfg = dict(head or {})
        self.loss = MaskLoss(loss, weights=class_weights, smoothing=label_smoothing)

    def make_metrics(self, num_classes: int) -> dict[str, Metric]:
        return {
            "miou": MulticlassJaccardIndex(num_classes, average="macro", ignore_index=PADDING),
            "acc": MulticlassAccuracy(num_classes, average="micro", ignore_index=PADDING),
        }

    def make_model(self) -> nn.Module:
        model = make_segmenter(
            self.model_cfg,
            num_classes=self.num_classes,
            in_chans=self.in_chans,
            img_size=self.img_size,
            pretrained=self.model_cfg.get("pretrained", False),
            head=self.head_cfg,
        )
        return tune(model, self.tuning, self.lora)

    def training_loss(self, batch: Batch) -> Tensor:
        images, masks = batch
        return self.loss(self(images), masks)

    def evaluate(self, split: str, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the predicted labels `[B, H, W]`, which the report draws."""
        images, masks = batch
        try:
            logits = self(images)
        except (AssertionError, RuntimeError) as error:
            height, width = images.shape[2:]
            if isinstance(error, torch.OutOfMemoryError) or height == width == self.img_size:
                raise
            name, why = self.model_cfg["name"], reason(error)
            raise ValueError(
                f"model.name={name!r} takes no image of {width}x{height} pixels ({why}): try task.head.pad_to=32, with "
                "model.args={dynamic_img_size: true} for ViT, {strict_img_size: false} for Swin"
            ) from error
        found = logits.argmax(dim=1)
        real = (masks != PADDING).sum()
        if real:
            loss = self.loss(logits, masks, plain=True)
            self.metrics[f"{split}_loss"].update(loss, weight=real)  # pyright: ignore
            for name in ("miou", "acc"):
                self.metrics[f"{split}_{name}"].update(found, masks)  # pyright: ignore
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        Task.on_save_checkpoint(self, checkpoint)
        if self.tuning == "lora":
            checkpoint["state_dict_ema"] = merge_lora(checkpoint["state_dict_ema"], self.lora)
        data: Any = getattr(self.trainer, "datamodule", None)
        checkpoint[CONFIG] = {
            "model": {key: value for key, value in self.model_cfg.items() if key != "pretrained"},
            "head": self.head_cfg,
            "num_classes": self.num_classes,
            "in_chans": self.in_chans,
            "img_size": self.img_size,
            "class_names": list(self.hparams.get("class_names") or map(str, range(self.num_classes))),
            "mean": list(getattr(data, "mean", [0.5] * self.in_chans)),
            "std": list(getattr(data, "std", [0.5] * self.in_chans)),
            "eval_size": getattr(data, "eval_size", None),
        }
