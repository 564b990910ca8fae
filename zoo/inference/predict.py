"""Predict classes, labels or values of images: as CSV, JSON and a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tasks.confusion import write_csv
from ..tasks.measured import THRESHOLD
from ..tasks.plots import plot_sheet
from .files import iterate
from .source import OpenedModel, describe_classes

MOST_SHOWN = 60  # images of a contact sheet


@dataclass(frozen=True)
class Prediction:
    """Most probable classes or labels of an image, or its values.

    Attributes:
        path: of the image.
        top: `(label, name, probability)`, most probable first, or `(number, name, value)` in the model's order; nothing
            for an image that cannot be read.
        error: why it cannot be read, or "".
        targets: of the model, "class", "labels" or "values".
    """

    path: Path
    top: tuple[tuple[int, str, float], ...] = ()
    error: str = ""
    image: Tensor | None = field(default=None, repr=False, compare=False)
    targets: str = "class"

    @property
    def in_words(self) -> str:
        """The most probable class, the labels, or the values."""
        if self.targets == "class":
            return f"{self.top[0][1]} {100 * self.top[0][2]:.0f} %"
        if self.targets == "values":
            return ", ".join(f"{name} {value:.4g}" for _, name, value in self.top)
        return ", ".join(f"{name} {100 * share:.0f} %" for _, name, share in self.top) or "none"

    @property
    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        if self.targets == "values":
            top = [{"name": name, "value": value} for _, name, value in self.top]
        else:
            top = [{"label": label, "name": name, "probability": round(p, 6)} for label, name, p in self.top]
        return {"file": str(self.path), "top": top} | ({"error": self.error} if self.error else {})


def predict(
    opened: OpenedModel,
    paths: Sequence[Path],
    *,
    topk: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
) -> list[Prediction]:
    """Predict classes, labels or values of image files, in their order.

    Args:
        opened: a model; it is moved to the device.
        paths: of images, see `files.find_images`.
        topk: classes or labels of each image, at most those of the model; None: the most probable class, or the labels
            whose probability is at least 0.5. Values are all told.
        batch_size: images at a time.
        num_workers: processes that load; 0: this one.
        device: that the model runs on.

    Raises:
        ValueError: topk below 1, or no image can be read.
    """
    if topk is not None and topk < 1:
        raise ValueError(f"topk={topk} must be at least 1")
    names = opened.names
    words = describe_classes(names)
    shown = [words.get(name, name) for name in names]
    opened.model.to(device)
    made: list[Prediction] = []
    for images, places, reasons in iterate(paths, opened, batch_size=batch_size, num_workers=num_workers):
        found = opened.predictions(images.to(device)).cpu()
        if opened.targets == "values":
            shares, labels = found, torch.arange(opened.num_classes).expand_as(found)
        else:
            count = topk if topk is not None else 1 if opened.targets == "class" else opened.num_classes
            shares, labels = found.topk(min(count, opened.num_classes))
        least = THRESHOLD if opened.targets == "labels" and topk is None else -math.inf
        pixels = opened.denormalize(images) if len(made) < MOST_SHOWN else [None] * len(images)
        for place, why, share, label, image in zip(
            places.tolist(), reasons, shares.tolist(), labels.tolist(), pixels, strict=True
        ):
            top = tuple((number, shown[number], p) for number, p in zip(label, share, strict=True) if p >= least)
            made.append(Prediction(paths[place], () if why else top, why, None if why else image, opened.targets))
    if all(prediction.error for prediction in made):
        raise ValueError(f"none of {len(made)} images can be read; the first is {made[0].path}: {made[0].error}")
    return made


def write_predictions(predictions: Sequence[Prediction], path: Path) -> Path:
    """Writes a .csv file: `file`, then `prediction`, `probability` and, with more, `prediction_2`, `probability_2`, …,
    or a column for each value; `error` where an image could not be read."""
    if predictions[0].targets == "values":
        names = next([name for _, name, _ in prediction.top] for prediction in predictions if prediction.top)
        cells = [[value for _, _, value in prediction.top] or [""] * len(names) for prediction in predictions]
        told = [[str(p.path), *values, p.error] for p, values in zip(predictions, cells, strict=True)]
        return write_csv(path, [["file", *names, "error"], *told])
    most = max(len(prediction.top) for prediction in predictions)
    marks = ["" if rank == 0 else f"_{rank + 1}" for rank in range(most)]
    header = ["file", *(f"{what}{mark}" for mark in marks for what in ("prediction", "probability")), "error"]
    rows = []
    for prediction in predictions:
        cells = [cell for _, name, share in prediction.top for cell in (name, share)]
        rows.append([str(prediction.path), *cells, *[""] * (2 * most - len(cells)), prediction.error])
    return write_csv(path, [header, *rows])


def write_sheet(predictions: Sequence[Prediction], path: Path, *, title: str = "") -> Path:
    """Draws the first images with their most probable class and its probability, as a PNG."""
    shown = [prediction for prediction in predictions if prediction.image is not None][:MOST_SHOWN]
    return plot_sheet(
        torch.stack([prediction.image for prediction in shown]),  # pyright: ignore[reportArgumentType]
        titles=[prediction.in_words for prediction in shown],
        title=title or f"{len(shown)} of {len(predictions)} images" * (len(shown) < len(predictions)),
        path=path,
    )
