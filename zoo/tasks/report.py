"""The report a run leaves in its folder: `metrics.csv`, learning curves, predictions, confusion, receptive field."""

from __future__ import annotations

import csv
import io
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from ...kernels.neighborhood.plot import plot_composed_receptive_field
from ..data.loader import PADDING
from .checkpoint import replacing
from .confusion import count_confusion, write_confusion
from .plots import Curve, first_stage, plot_curves, plot_predictions

MOST_MISTAKES, MOST_IMAGES = 24, 60
LOSS_TITLES = {"ce": "Cross-entropy", "bce": "Binary cross-entropy", "focal": "Focal loss"}
UNREADABLE = "unreadable.csv"  # of a run: images that do not count


def read_unreadable(run_dir: Path) -> list[dict[str, str]]:
    """Split, file and reason of the images that a run could not read."""
    path = run_dir / UNREADABLE
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


class Sample:
    """At most `most` of the items offered, each with the same chance; the same ones in every run."""

    def __init__(self, most: int):
        self.most, self.offered = most, 0
        self.items: list[tuple[Any, ...]] = []
        self._random = random.Random(0)

    def offer(self, item: tuple[Any, ...]) -> None:
        self.offered += 1
        if len(self.items) < self.most:
            self.items.append(item)
        elif (place := self._random.randrange(self.offered)) < self.most:
            self.items[place] = item


class MetricTable(Callback):
    """Writes `metrics.csv`, a row an epoch; epochs without validation have no value of it.

    The rows are part of the checkpoint: a resumed run goes on with the table of the run it continues.

    Args:
        dirpath: the run's folder.
    """

    def __init__(self, dirpath: str):
        self.dirpath = Path(dirpath)
        self.rows: list[dict[str, float]] = []
        self._validated: dict[str, float] = {}  # in this epoch; the trainer keeps those of earlier ones, too

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._validated = list(state_dict["rows"]), dict(state_dict.get("validated", {}))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validated = _values(trainer, "val/")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        trained = _values(trainer, "train/")
        if not trained:  # it goes on from the end of an epoch: the batches were of another process
            with warnings.catch_warnings():  # as is their count
                warnings.filterwarnings("ignore", message=".*was called before the ``update`` method.*")
                trained = {"train/loss": float(pl_module.train_loss.compute())}  # pyright: ignore
        row |= trained | self._validated
        self._validated = {}
        row["lr"] = max(group["lr"] for group in trainer.optimizers[0].param_groups)  # the head's, with layer decay
        self.rows = [old for old in self.rows if old["epoch"] < row["epoch"]] + [row]
        if trainer.is_global_zero and not trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            rows = [{**row, "epoch": int(row["epoch"]), "step": int(row["step"])} for row in self.rows]
            _write_csv(self.dirpath / "metrics.csv", rows)


class Report(MetricTable):
    """Writes `metrics.csv` (a row an epoch), `curves.png`, `predictions.png`, `confusion.png`, `confusion.csv`,
    `per_class.csv` and `receptive_field.png`, and if images could not be read `unreadable.csv`.

    Args:
        dirpath: the run's folder.
    """

    def __init__(self, dirpath: str):
        super().__init__(dirpath)
        self._mistakes, self._right = Sample(MOST_MISTAKES), Sample(MOST_IMAGES)
        self._confusion: Tensor | None = None

    def curve(self, task: LightningModule) -> Curve:
        """Metric, title and axis of `curves.png`."""
        loss = getattr(getattr(task, "loss", None), "name", "ce")
        return Curve("val/acc1", "Validation accuracy", "top-1", loss=LOSS_TITLES[loss])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._list_unreadable(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._list_unreadable(trainer)

    def _list_unreadable(self, trainer: Trainer) -> None:
        """Adds files that could not be read, on whatever rank, to those of `unreadable.csv`."""
        parts: list[Any] = [getattr(trainer.datamodule, "unreadable", {})]  # pyright: ignore
        if trainer.world_size > 1:
            parts *= trainer.world_size
            torch.distributed.all_gather_object(parts, parts[0])
        path = self.dirpath / UNREADABLE
        found = {(split, file): why for part in parts for split, files in part.items() for file, why in files.items()}
        if not trainer.is_global_zero or not found:
            return
        found = {(row["split"], row["file"]): row["reason"] for row in read_unreadable(self.dirpath)} | found
        rows = [{"split": split, "file": file, "reason": why} for (split, file), why in sorted(found.items())]
        _write_csv(path, rows)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.rows:
            plot_curves(self.rows, curve=self.curve(pl_module), path=self.dirpath / "curves.png")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mistakes, self._right, self._confusion = Sample(MOST_MISTAKES), Sample(MOST_IMAGES), None
        size, dtype = trainer.datamodule.img_size, next(pl_module.parameters()).dtype  # pyright: ignore
        image = torch.zeros(1, pl_module.in_chans, size, size, device=pl_module.device, dtype=dtype)  # pyright: ignore
        found = first_stage(pl_module.model, image)  # pyright: ignore - on every rank: sharded weights meet in forward
        if found is not None and trainer.is_global_zero:
            plot_composed_receptive_field(*found, path=self.dirpath / "receptive_field.png")

    def _count(self, targets: Tensor, predicted: Tensor, num_classes: int) -> None:
        """Adds a batch to the confusion matrix; targets of PADDING do not count."""
        real = targets != PADDING
        counts = count_confusion(targets[real], predicted[real], num_classes)
        self._confusion = counts if self._confusion is None else self._confusion + counts

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs is None:
            return
        images, targets = batch
        predicted = outputs.argmax(dim=1)
        self._count(targets, predicted, outputs.shape[1])
        for image, target, guess in zip(images, targets.tolist(), predicted.tolist(), strict=True):
            if target != PADDING:
                (self._right if target == guess else self._mistakes).offer((image.cpu(), target, guess))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._list_unreadable(trainer)
        self._write_confusion(trainer)
        shown = (self._mistakes.items + self._right.items)[:MOST_IMAGES]
        if not trainer.is_global_zero or not shown:
            return
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        plot_predictions(
            data.denormalize(torch.stack([image for image, _, _ in shown])),
            targets=[target for _, target, _ in shown],
            predictions=[guess for _, _, guess in shown],
            class_names=data.class_names,
            accuracy=float(trainer.callback_metrics["test/acc1"]),
            path=self.dirpath / "predictions.png",
        )

    def _write_confusion(self, trainer: Trainer) -> None:
        """Counts of all ranks, as tables and a picture."""
        counts = self._confusion
        if counts is None:
            return
        if trainer.world_size > 1:
            torch.distributed.all_reduce(counts)
        if trainer.is_global_zero and int(counts.sum()):
            self.write_tables(counts.cpu(), trainer.datamodule.class_names)  # pyright: ignore

    def write_tables(self, counts: Tensor, class_names: Sequence[str]) -> None:
        """Writes the confusion `[classes, classes]` and the table per class."""
        write_confusion(counts, class_names, self.dirpath)


def _values(trainer: Trainer, group: str) -> dict[str, float]:
    """Latest values of a group of metrics."""
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(group) and not name.endswith("_step")
    }


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as partial:
        partial.write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape")
