"""Tables of what was predicted for images with several labels or with numbers, and their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multilabel_average_precision

from .confusion import write_csv
from .plots import FONT, MUTED, TRAIN, save_figure

THRESHOLD = 0.5  # of the probability, from which an image has a label
MOST_DRAWN = 12  # values: more panels cannot be read


def per_label(probabilities: Tensor, targets: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the table per label.

    Args:
        probabilities, targets: `[N, labels]`; targets are 0 or 1.
        names: of the labels.

    Returns:
        For each `label`, `images` that have it, `precision`, `recall` and `f1` at the probability 0.5, and `ap`, the
        average precision (0 to 1; None where nothing is counted).
    """
    guessed, actual = probabilities >= THRESHOLD, targets.bool()
    right, guesses, images = ((x.sum(0)).tolist() for x in (guessed & actual, guessed, actual))
    average: Any = multilabel_average_precision(
        probabilities, actual.long(), num_labels=len(names), average="none", validate_args=False
    )
    return [
        {
            "label": name,
            "images": images[i],
            "precision": right[i] / guesses[i] if guesses[i] else None,
            "recall": right[i] / images[i] if images[i] else None,
            "f1": 2 * right[i] / (images[i] + guesses[i]) if images[i] + guesses[i] else None,
            "ap": float(average[i]) if images[i] else None,
        }
        for i, name in enumerate(names)
    ]


def per_value(found: Tensor, targets: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the table per value.

    Args:
        found, targets: `[N, values]`.
        names: of the values.

    Returns:
        For each `value`, `images`, `mae` and `rmse` in its unit, and `r2`, the share of the variance that is explained
        (None where all targets are equal).
    """
    error = (found - targets).double()
    spread = (targets.double() - targets.double().mean(0)).square().sum(0).tolist()
    squared, mae = error.square().sum(0).tolist(), error.abs().mean(0).tolist()
    return [
        {
            "value": name,
            "images": len(targets),
            "mae": mae[i],
            "rmse": (squared[i] / len(targets)) ** 0.5,
            "r2": 1 - squared[i] / spread[i] if spread[i] else None,
        }
        for i, name in enumerate(names)
    ]


def mean_of(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """Mean of a column over the rows that have it."""
    known = [row[key] for row in rows if row[key] is not None]
    return sum(known) / len(known) if known else None


def said(kind: str, outputs: Sequence[float], names: Sequence[str]) -> str:
    """Prediction or target of an image in words: the labels that it has, or its values."""
    if kind == "labels":
        return ", ".join(name for name, share in zip(names, outputs, strict=True) if share >= THRESHOLD) or "none"
    if len(names) == 1:
        return f"{outputs[0]:.4g}"
    return ", ".join(f"{name} {value:.4g}" for name, value in zip(names, outputs, strict=True))


def write_measured(kind: str, outputs: Tensor, targets: Tensor, names: Sequence[str], folder: Path) -> list[Path]:
    """Writes `per_label.csv`, or `per_value.csv` and `values.png`, to a folder and returns their paths.

    Args:
        kind: "labels" or "values".
        outputs: probabilities or values, `[N, T]`.
        targets: `[N, T]`.
        names: T.
        folder: made where it is missing.
    """
    table = (per_label if kind == "labels" else per_value)(outputs, targets, names)
    rows = [list(table[0]), *(list(row.values()) for row in table)]
    written = [write_csv(folder / f"per_{'label' if kind == 'labels' else 'value'}.csv", rows)]
    if kind == "values":
        written.append(plot_values(outputs, targets, names, path=folder / "values.png"))
    return written


def plot_values(found: Tensor, targets: Tensor, names: Sequence[str], *, path: Path) -> Path:
    """Draws predicted over true values, a panel for each of the first twelve.

    Args:
        found, targets: `[N, values]`.
        names: of the values.
        path: where the PNG goes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    count = min(len(names), MOST_DRAWN)
    columns = min(count, 4)
    rows = -(-count // columns)
    with rc_context(FONT):
        figure = Figure(figsize=(3.0 * columns + 0.4, 3.0 * rows + 0.3), dpi=160, layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax in axes[count:]:
            ax.set_visible(False)
        for i, ax in enumerate(axes[:count]):
            both = torch.cat([found[:, i], targets[:, i]])
            ends = [float(both.min()), float(both.max())]
            ax.plot(ends, ends, color=MUTED, linewidth=0.8)
            ax.plot(targets[:, i].numpy(), found[:, i].numpy(), ".", color=TRAIN, markersize=4, alpha=0.6)
            ax.set(title=" ".join(names[i].split())[:40], xlabel="true", ylabel="predicted")
            ax.spines[["top", "right"]].set_visible(False)
        return save_figure(figure, path)
