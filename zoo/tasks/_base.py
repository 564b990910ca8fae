"""Task: the training loop that every task shares. A task says `make_model`, `training_loss` and what it measures.

Every random number of a training step follows from (seed, rank, epoch, batch), so a run that was killed and resumed
makes the steps it would have made.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from ..data.loader import mix_seed
from .optim import make_optimizer
from .portable import make_portable
from .sharding import repeated_blocks, shard


def mean_metrics(*names: str) -> dict[str, Metric]:
    """A mean for each of these in validation and in the test, as `Task` wants its metrics."""
    return {f"{split}_{name}": MeanMetric() for split in ("val", "test") for name in names}


class Task(LightningModule):
    """Trains what `make_model` makes by `training_loss`. A subclass calls `save_hyperparameters` itself.

    Args:
        metrics: by name, `val_loss`, `test_loss` and more of `val_` and `test_`; they are logged as `val/loss`.
        optimizer: arguments of `timm.optim.create_optimizer_v2`.
        scheduler: what `make_scheduler` reads; None: the learning rate stays.
        compile: `enabled`, `mode` and `fullgraph` for `torch.compile` of each repeated block.
        seed: of the run.
    """

    progress_metric = "val_loss"  # shown beside the progress bar

    def __init__(
        self,
        *,
        metrics: Mapping[str, Metric],
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any] | None = None,
        compile: Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.optimizer_cfg, self.scheduler_cfg = dict(optimizer), dict(scheduler or {})
        self.compile_cfg, self.seed = dict(compile or {}), seed
        self.model: Any = None
        self.train_loss = MeanMetric()
        self.metrics = nn.ModuleDict(metrics)

    # a task says

    def make_model(self) -> nn.Module:
        """The model, on the CPU or the meta device as Lightning asks."""
        raise NotImplementedError

    def training_loss(self, batch: Any) -> Tensor:
        """The loss of a batch, a mean over its items."""
        raise NotImplementedError

    def weight(self, batch: Any) -> Any:
        """The weight of a batch in the mean loss of an epoch."""
        return 1.0

    def evaluate(self, split: str, batch: Any, batch_idx: int) -> Any:
        """Updates the metrics of "val" or "test".

        Returns:
            The result of `test_step`: logits `[B, classes]` of the targets of the batch, of which the report draws
            mistakes and confusion, or None where there is nothing to draw.
        """
        self.metrics[f"{split}_loss"].update(self.training_loss(batch), weight=self.weight(batch))  # pyright: ignore

    def record(self, split: str, found: Mapping[str, Any], *, weight: int) -> None:
        """Adds the means over a batch of `weight` items to the metrics of a split, by name."""
        for name, x in found.items():
            self.metrics[f"{split}_{name}"].update(x, weight=weight)  # pyright: ignore

    def make_scheduler(self, optimizer: torch.optim.Optimizer, scale: float) -> Any:
        """The schedule that `scheduler` describes, stepped at every update; `scale` is that of the learning rate."""
        raise NotImplementedError

    def learning_rate_scale(self) -> float:
        """Factor of the learning rate, of the batch size for instance."""
        return 1.0

    def seed_epoch(self) -> int:
        """The epoch that random numbers of training follow from."""
        return self.current_epoch

    def names_matter(self) -> bool:
        """Weights of classes with other labels must be refused."""
        return True

    def shown_name(self, name: str) -> str:
        """The name that a metric is logged under; names of modules have no slashes."""
        return name.replace("_", "/", 1)

    # the loop

    @property
    def measured(self) -> list[str]:
        """Names of what training and evaluation log."""
        return ["train/loss", *map(self.shown_name, self.metrics)]

    def configure_model(self) -> None:
        """Builds the model once; under a sharded strategy its blocks are split over the devices here."""
        if self.model is not None:
            return
        self.model = self.make_model()
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh, precision=self.trainer.precision)
        if self.compile_cfg.get("enabled"):
            options = {key: self.compile_cfg[key] for key in ("mode", "fullgraph") if key in self.compile_cfg}
            for block in repeated_blocks(self.model) or [self.model]:
                block.compile(**options)

    def on_train_epoch_start(self) -> None:
        self.train_loss.reset()  # not called when a run is resumed inside an epoch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed = mix_seed(self.seed, self.global_rank, self.seed_epoch(), batch_idx)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.training_loss(batch)
        self.train_loss.update(loss.detach(), weight=self.weight(batch))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train/loss_step", loss.detach(), on_step=True, on_epoch=False, prog_bar=True)
        return loss

    def _evaluate(self, split: str, batch: Any, batch_idx: int = 0) -> Any:
        result = self.evaluate(split, batch, batch_idx)
        for name, metric in self.metrics.items():
            if name.startswith(f"{split}_"):
                shown, progress = self.shown_name(name), name == self.progress_metric
                self.log(shown, metric, on_step=False, on_epoch=True, prog_bar=progress)  # pyright: ignore
        return result

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """Returns the result of `evaluate`, which a report may draw."""
        return self._evaluate("test", batch, batch_idx)

    def configure_optimizers(self):
        assert self.model is not None
        scale = self.learning_rate_scale()
        optimizer = make_optimizer(self.model, self.optimizer_cfg, scale=scale)
        if not self.scheduler_cfg:
            return optimizer
        scheduler = self.make_scheduler(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # exact resume

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the mean loss of a half-done epoch (no other metric is alive between steps), and what others need."""
        metric = self.train_loss
        checkpoint["train_loss"] = {"mean_value": metric.mean_value, "weight": metric.weight}
        make_portable(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses weights whose classes have other labels: they would be taken for each other."""
        saved = checkpoint.get("hyper_parameters", {})
        theirs, ours = (list(holder.get("class_names") or []) for holder in (saved, self.hparams))
        if self.names_matter() and theirs and ours and theirs != ours:
            pairs = enumerate(zip_longest(theirs, ours))
            label, (there, here) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
            raise ValueError(
                f"the checkpoint numbers the classes otherwise than the data: label {label} is {there!r} there and "
                f"{here!r} here; give the data the classes that it had, or their order by data.class_names"
            )
        averaging = any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks)  # pyright: ignore
        if self.trainer.state.fn == TrainerFn.FITTING and "current_model_state" in checkpoint and not averaging:
            checkpoint["state_dict"] = checkpoint["current_model_state"]  # its optimizer state belongs to these weights
        for name, value in checkpoint.get("train_loss", {}).items():
            setattr(self.train_loss, name, value.clone())
