"""The report of tasks whose images have several labels, or numbers."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from .measured import said, write_measured
from .plots import Curve, plot_sheet
from .report import MOST_IMAGES, Report, Sample

CURVES = {
    "labels": Curve("val/map", "Mean average precision", "mAP"),
    "values": Curve("val/r2", "Share of the variance explained", "R²", percent=False),
}


class TableReport(Report):
    """Writes `metrics.csv`, `curves.png`, `predictions.png`, `receptive_field.png`, and `per_label.csv`, or of numbers
    `per_value.csv` and `values.png`.

    Args:
        dirpath: the run's folder.
    """

    def __init__(self, dirpath: str):
        super().__init__(dirpath)
        self._outputs: list[tuple[Tensor, Tensor]] = []
        self._images = Sample(MOST_IMAGES)

    def curve(self, task: LightningModule) -> Curve:
        return CURVES[task.targets]  # pyright: ignore[reportArgumentType]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_test_start(trainer, pl_module)
        self._outputs, self._images = [], Sample(MOST_IMAGES)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        images, targets = batch
        real = ~targets.isnan().any(dim=1)
        found = outputs.sigmoid() if pl_module.targets == "labels" else outputs
        found, targets = found[real].cpu(), targets[real].cpu()
        self._outputs.append((found, targets))
        for item in zip(images[real], found.tolist(), targets.tolist(), strict=True):
            self._images.offer((item[0].cpu(), *item[1:]))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._list_unreadable(trainer)
        parts: list[Any] = [tuple(torch.cat(x) for x in zip(*self._outputs, strict=True))]
        if trainer.world_size > 1:
            parts *= trainer.world_size
            torch.distributed.all_gather_object(parts, parts[0])
        outputs, targets = (torch.cat(x) for x in zip(*parts, strict=True))
        if not trainer.is_global_zero or not len(outputs):
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        kind, names = str(pl_module.targets), data.class_names
        write_measured(kind, outputs, targets, names, self.dirpath)
        shown = self._images.items
        titles = [
            guess
            if (guess := said(kind, found, names)) == (true := said(kind, target, names))
            else f"{guess}; is {true}"
            for _, found, target in shown
        ]
        images = data.denormalize(torch.stack([image for image, _, _ in shown]))
        title = f"{len(shown)} of {len(outputs)} test images" * (len(shown) < len(outputs))
        plot_sheet(images, titles=titles, title=title, path=self.dirpath / "predictions.png")
