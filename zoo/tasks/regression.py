"""Numbers of images, such as an age or a dose: standardised in training, in their own units outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.regression import MeanAbsoluteError, R2Score

from ..data.names import unknown_name
from .image import ImageTask
from .tuning import classifier_names

Batch = tuple[Tensor, Tensor]
LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


class RegressionTask(ImageTask):
    """Trains a timm model on `(images [B, C, H, W], targets [B, values])`.

    The model that trains predicts `(value - value_mean) / value_std`, and the loss is of these. Metrics, and the model
    of checkpoints under `state_dict_ema`, which exports take, are in the units of the data. `mae` and `r2` are means
    over the values.

    Args:
        class_names: names of the values; kept in checkpoints under `hyper_parameters`.
        value_mean, value_std: of the values of the training images, one for each.
        loss: "mse", "l1" or "huber".
        options: see `ImageTask`.

    Raises:
        ValueError: as `ImageTask`; an unknown loss, or a model whose classifier is no linear layer with a bias.
    """

    targets = "values"
    progress_metric = "val_r2"

    def __init__(
        self,
        *,
        model: Mapping[str, Any],
        num_classes: int,
        class_names: Sequence[str] | None = None,
        value_mean: Sequence[float],
        value_std: Sequence[float],
        loss: str = "mse",
        **options: Any,
    ):
        if loss not in LOSSES:
            raise unknown_name("task.loss", loss, LOSSES)
        super().__init__(model=model, num_classes=num_classes, **options)
        self.save_hyperparameters(ignore=["targets"])
        self.loss_name, self.loss = loss, LOSSES[loss]
        self.value_mean, self.value_std = torch.tensor(value_mean), torch.tensor(value_std)

    def make_metrics(self, num_classes: int) -> dict[str, Metric]:
        return {"mae": MeanAbsoluteError(), "r2": R2Score()}

    def make_model(self) -> nn.Module:
        model = super().make_model()
        if not isinstance(_head(model), nn.Linear) or _head(model).bias is None:
            raise ValueError(f"model.name={self.model_cfg['name']!r}: regression needs a linear classifier with a bias")
        return model

    def standardise(self, values: Tensor) -> Tensor:
        """Values `[B, values]` as the loss sees them."""
        return (values - self.value_mean.to(values)) / self.value_std.to(values)

    def in_units(self, outputs: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        return outputs * self.value_std.to(outputs) + self.value_mean.to(outputs)

    def training_loss(self, batch: Batch) -> Tensor:
        images, targets = batch
        real = ~targets.isnan().any(dim=1)
        return self.with_matching(self.loss(self(images)[real], self.standardise(targets[real])))

    def evaluate(self, split: str, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the values `[B, values]` in the units of the data, which the report draws."""
        images, targets = batch
        outputs = self(images)
        found, real = self.in_units(outputs), ~targets.isnan().any(dim=1)
        if real.any():
            loss = self.loss(outputs[real], self.standardise(targets[real]))
            self.metrics[f"{split}_loss"].update(loss, weight=real.sum())  # pyright: ignore
            for name in ("mae", "r2"):
                self.metrics[f"{split}_{name}"].update(found[real], targets[real])  # pyright: ignore
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        assert self.model is not None
        (name,) = classifier_names(self.model)
        weights = dict(checkpoint["state_dict_ema"])
        std, mean = (x.to(weights[f"{name}.bias"]) for x in (self.value_std, self.value_mean))
        weights[f"{name}.weight"] = weights[f"{name}.weight"] * std[:, None]
        weights[f"{name}.bias"] = weights[f"{name}.bias"] * std + mean
        checkpoint["state_dict_ema"] = weights


def _head(model: nn.Module) -> Any:
    names = classifier_names(model)
    return model.get_submodule(names[0]) if len(names) == 1 else None
