"""The report of segmentation: intersection over union per class, confusion of pixels, images beside their masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..data.loader import PADDING
from .confusion import plot_confusion, write_csv
from .plots import FONT, Curve, palette, save_figure
from .report import LOSS_TITLES, Report, Sample

MOST_SHOWN, MOST_NAMED = 8, 12  # images; classes of the legend
CURVE = Curve("val/miou", "Mean intersection over union", "mIoU")


def per_class(matrix: Tensor, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the table per class.

    Args:
        matrix: pixels `[classes, classes]`; row: true class, column: predicted class.
        class_names: by class number.

    Returns:
        For each class `class`, `pixels`, `iou`, `recall` and `precision` (0 to 1; None where nothing is counted).
    """
    right, actual, guessed = matrix.diagonal().tolist(), matrix.sum(1).tolist(), matrix.sum(0).tolist()
    either = [a + g - r for r, a, g in zip(right, actual, guessed, strict=True)]
    return [
        {
            "class": name,
            "pixels": actual[i],
            "iou": right[i] / either[i] if either[i] else None,
            "recall": right[i] / actual[i] if actual[i] else None,
            "precision": right[i] / guessed[i] if guessed[i] else None,
        }
        for i, name in enumerate(class_names)
    ]


def summarize(matrix: Tensor, class_names: Sequence[str]) -> dict[str, float]:
    """`miou`, the mean over classes that are there or predicted, and `acc`, the share of right pixels (0 to 1)."""
    known = [row["iou"] for row in per_class(matrix, class_names) if row["iou"] is not None]
    return {
        "miou": sum(known) / max(len(known), 1),
        "acc": int(matrix.diagonal().sum()) / max(int(matrix.sum()), 1),
    }


def write_pixels(matrix: Tensor, class_names: Sequence[str], folder: Path) -> list[Path]:
    """Writes `confusion.csv`, `per_class.csv` and `confusion.png` to a folder and returns their paths.

    Args:
        matrix, class_names: see `per_class`.
        folder: made where it is missing.
    """
    table = per_class(matrix, class_names)
    counts = [["true \\ predicted", *class_names]]
    counts += [[name, *row] for name, row in zip(class_names, matrix.tolist(), strict=True)]
    return [
        write_csv(folder / "confusion.csv", counts),
        write_csv(folder / "per_class.csv", [list(table[0]), *(list(row.values()) for row in table)]),
        plot_confusion(matrix, class_names, unit="pixels", path=folder / "confusion.png"),
    ]


def paint(labels: Tensor, count: int) -> Tensor:
    """Labels `[H, W]` in the colours of their classes, `[H, W, 3]` uint8; pixels that do not count are white."""
    colours = torch.tensor([*palette(count), (255, 255, 255)], dtype=torch.uint8)
    return colours[torch.where(labels == PADDING, count, labels)]


def plot_masks(
    items: Sequence[tuple[Tensor, ...]], *, columns: Sequence[str], class_names: Sequence[str], title: str, path: Path
) -> Path:
    """Draws images in rows beside masks.

    Args:
        items: an image `[C, H, W]` in 0..1 and masks `[H, W]`, for each row.
        columns: titles of these.
        class_names: by label.
        title: of the picture; "" for none.
        path: where the PNG goes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    with rc_context(FONT):
        size = (1.9 * len(columns) + 1.4, 1.9 * len(items) + 0.6)
        figure = Figure(figsize=size, dpi=160, layout="constrained")
        axes = figure.subplots(len(items), len(columns), squeeze=False)
        for row, (image, *masks) in zip(axes, items, strict=True):
            row[0].imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            for ax, mask in zip(row[1:], masks, strict=True):
                ax.imshow(paint(mask, len(class_names)).numpy(), interpolation="nearest")
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for ax, name in zip(axes[0], columns, strict=True):
            ax.set_title(name)
        shown = list(zip(class_names, palette(len(class_names)), strict=True))[:MOST_NAMED]
        patches = [Patch(color=[c / 255 for c in colour], label=" ".join(name.split())[:24]) for name, colour in shown]
        figure.legend(handles=patches, loc="outside right upper", frameon=False)
        if title:
            figure.suptitle(title, fontweight="bold")
        return save_figure(figure, path)


class MaskReport(Report):
    """Writes `metrics.csv`, `curves.png`, `predictions.png`, `confusion.png`, `confusion.csv`, `per_class.csv` and
    `receptive_field.png`.

    Args:
        dirpath: the run's folder.
    """

    def __init__(self, dirpath: str):
        super().__init__(dirpath)
        self._shown = Sample(MOST_SHOWN)

    def curve(self, task: LightningModule) -> Curve:
        loss = str(task.loss.name)  # pyright: ignore[reportAttributeAccessIssue]
        return Curve(CURVE.name, CURVE.title, CURVE.label, loss=LOSS_TITLES.get(loss, "Loss"))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_test_start(trainer, pl_module)
        self._shown = Sample(MOST_SHOWN)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        images, masks = batch
        self._count(masks, outputs, int(pl_module.num_classes))  # pyright: ignore[reportArgumentType]
        for image, mask, found in zip(images, masks, outputs, strict=True):
            if (mask != PADDING).any():
                self._shown.offer((image.cpu(), mask.cpu(), found.cpu()))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._list_unreadable(trainer)
        self._write_confusion(trainer)
        if not trainer.is_global_zero or not self._shown.items:
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        items = [(data.denormalize(image), mask, found) for image, mask, found in self._shown.items]
        miou = 100 * float(trainer.callback_metrics["test/miou"])
        plot_masks(
            items,
            columns=("image", "true", "predicted"),
            class_names=data.class_names,
            title=f"Test mIoU {miou:.2f} %",
            path=self.dirpath / "predictions.png",
        )

    def write_tables(self, counts: Tensor, class_names: Sequence[str]) -> None:
        write_pixels(counts, class_names, self.dirpath)
