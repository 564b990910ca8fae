"""The report of bags: the instances that attention weighs most, beside the usual tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..data.loader import PADDING
from .plots import FONT, Curve, save_figure
from .report import Report, Sample

BAGS, SHOWN = 8, 10  # drawn, and instances of each


class BagReport(Report):
    """Writes `metrics.csv`, `curves.png`, `confusion.png`, `confusion.csv`, `per_class.csv`, and of images `bags.png`.

    Args:
        dirpath: the run's folder.
    """

    def __init__(self, dirpath: str):
        super().__init__(dirpath)
        self._bags = Sample(BAGS)

    def curve(self, task: LightningModule) -> Curve:
        return Curve("val/auroc", "Area under the ROC curve", "AUROC", percent=False)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._confusion, self._bags = None, Sample(BAGS)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        instances, labels, mask, *_ = batch
        predicted, real = outputs.logits.argmax(dim=1), labels != PADDING
        self._count(labels, predicted, outputs.logits.shape[1])
        if instances.dim() != 5 or outputs.attention is None:
            return
        weights = outputs.attention.float().mean(1)
        for i in real.nonzero()[:, 0].tolist():
            order = weights[i].masked_fill(~mask[i], -1).argsort(descending=True)[: min(SHOWN, int(mask[i].sum()))]
            strongest = instances[i][order].cpu(), weights[i][order].tolist(), int(mask[i].sum())
            self._bags.offer((*strongest, int(labels[i]), int(predicted[i])))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_confusion(trainer)
        if trainer.is_global_zero and self._bags.items:
            data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            rows = [(data.denormalize(images), *rest) for images, *rest in self._bags.items]
            plot_bags(rows, class_names=data.class_names, path=self.dirpath / "bags.png")


def plot_bags(rows: list[tuple[Tensor, list[float], int, int, int]], *, class_names: list[str], path: Path) -> Path:
    """Draw bags in rows: their instances from the largest weight down.

    Args:
        rows: images `[n, C, H, W]` in 0..1, their weights, the number of instances, the label and the predicted one.
        class_names: by label.
        path: where the PNG goes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = max(len(images) for images, *_ in rows)
    with rc_context(FONT):
        figure = Figure(figsize=(0.75 * columns + 1.4, 0.95 * len(rows) + 0.4), dpi=160, layout="constrained")
        grid = figure.subplots(len(rows), columns + 1, squeeze=False, width_ratios=[1.6, *[1] * columns])
        for axes, (images, weights, count, label, guess) in zip(grid, rows, strict=True):
            wrong = "" if label == guess else f"\nis {class_names[label]}"
            axes[0].text(0, 0.5, f"{class_names[guess]}{wrong}\n{count} instances", va="center", fontsize=8)
            for ax in axes:
                ax.axis("off")
            for ax, image, weight in zip(axes[1:], images, weights, strict=False):
                pixels = image.permute(1, 2, 0).expand(-1, -1, 3) if len(image) == 1 else image.permute(1, 2, 0)
                ax.imshow(pixels.numpy(), vmin=0, vmax=1, interpolation="nearest")
                ax.set_title(f"{100 * weight:.0f} %", fontsize=8, pad=2)
        figure.suptitle("Instances of test bags by the weight of their attention", fontsize=9)
        return save_figure(figure, path)
