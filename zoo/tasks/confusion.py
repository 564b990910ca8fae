"""Confusion of classes: the matrix, its table per class, and its picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import replacing
from .plots import FONT, save_figure

MOST_DRAWN, MOST_NUMBERS = 40, 25  # classes: more names, or more counts, cannot be read


def count_confusion(targets: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Counts of every pair of true and predicted class.

    Args:
        targets, predictions: class numbers `[N]`, int64.
        num_classes: rows and columns of the matrix.

    Returns:
        int64 `[num_classes, num_classes]`; row: true class, column: predicted class.
    """
    return torch.bincount(targets * num_classes + predictions, minlength=num_classes**2).view(num_classes, num_classes)


def per_class(matrix: Tensor, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the table per class.

    Args:
        matrix: see `count_confusion`.
        class_names: by class number.

    Returns:
        For each class `class`, `images`, `precision`, `recall` and `f1` (0 to 1; None where nothing is counted), and
        `taken_for`, the class that its images are most often mistaken for, with `mistakes`, their count.
    """
    right, actual, guessed = matrix.diagonal().tolist(), matrix.sum(1).tolist(), matrix.sum(0).tolist()
    wrong = matrix - matrix.diagonal().diag()
    most, where = (t.tolist() for t in wrong.max(1))
    return [
        {
            "class": name,
            "images": actual[i],
            "precision": right[i] / guessed[i] if guessed[i] else None,
            "recall": right[i] / actual[i] if actual[i] else None,
            "f1": 2 * right[i] / (actual[i] + guessed[i]) if actual[i] + guessed[i] else None,
            "taken_for": class_names[where[i]] if most[i] else "",
            "mistakes": most[i],
        }
        for i, name in enumerate(class_names)
    ]


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    """Writes rows of cells, floats with six digits and None as an empty cell; the file is whole or not there."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape")
    return path


def write_confusion(matrix: Tensor, class_names: Sequence[str], folder: Path) -> list[Path]:
    """Writes `confusion.csv`, `per_class.csv` and `confusion.png` to a folder and returns their paths.

    Args:
        matrix: see `count_confusion`.
        class_names: by class number.
        folder: made where it is missing.
    """
    table = per_class(matrix, class_names)
    counts = [["true \\ predicted", *class_names]]
    counts += [[name, *row] for name, row in zip(class_names, matrix.tolist(), strict=True)]
    return [
        write_csv(folder / "confusion.csv", counts),
        write_csv(folder / "per_class.csv", [list(table[0]), *(list(row.values()) for row in table)]),
        plot_confusion(matrix, class_names, path=folder / "confusion.png"),
    ]


def _most_confused(matrix: Tensor) -> Tensor:
    """Numbers of the classes that take part in most mistakes, in their order."""
    wrong = matrix - matrix.diagonal().diag()
    return (wrong.sum(0) + wrong.sum(1)).argsort(descending=True, stable=True)[:MOST_DRAWN].sort().values


def _short(name: str, most: int = 24) -> str:
    name = " ".join(name.split())
    return name if len(name) <= most else f"{name[: most - 1]}…"


def plot_confusion(matrix: Tensor, class_names: Sequence[str], *, path: Path, unit: str = "images") -> Path:
    """Draws the matrix: colour is the share of the true class, numbers are images, or of pixels the share in percent.

    Of more than 40 classes those are drawn that take part in most mistakes.

    Args:
        matrix: see `count_confusion`.
        class_names: by class number.
        path: where the PNG goes.
        unit: what is counted, "images" or "pixels".
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    total, right, count = int(matrix.sum()), int(matrix.diagonal().sum()), len(matrix)
    title = f"{100 * right / max(total, 1):.2f} % of {total:,} {unit} right"
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    if count > MOST_DRAWN:
        chosen = _most_confused(matrix)
        matrix, shares = matrix[chosen][:, chosen], shares[chosen][:, chosen]
        class_names = [class_names[i] for i in chosen.tolist()]
        title += f"; the {len(chosen)} of {count} classes with most mistakes"
    names = [_short(name) for name in class_names]
    side = max(3.2, (0.36 if len(names) <= MOST_NUMBERS else 0.2) * len(names))
    beside = 0.085 * max(map(len, names))
    with rc_context(FONT):
        figure = Figure(figsize=(side + beside + 1.6, side + beside + 0.9), dpi=160, layout="constrained")
        ax = figure.subplots()
        image = ax.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        size = 9 if len(names) <= MOST_NUMBERS else 7
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
        ax.set_yticks(range(len(names)), names, fontsize=size)
        ax.set(xlabel="predicted", ylabel="true")
        ax.set_title(title, fontweight="bold")
        if len(names) <= MOST_NUMBERS:
            for i, j in matrix.nonzero().tolist():
                colour = "white" if shares[i, j] > 0.5 else "black"
                number = int(matrix[i, j]) if unit == "images" else round(100 * float(shares[i, j]))
                ax.text(j, i, f"{number}", ha="center", va="center", color=colour, fontsize=8)
        bar = figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02, label="share of the true class")
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        return save_figure(figure, path)
