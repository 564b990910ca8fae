"""Predict the classes of images: names with probabilities, as CSV, JSON and a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tasks.confusion import write_csv
from ..tasks.plots import plot_sheet
from .files import iterate
from .source import OpenedModel, describe_classes

MOST_SHOWN = 60  # images of a contact sheet


@dataclass(frozen=True)
class Prediction:
    """Most probable classes of an image.

    Attributes:
        path: of the image.
        top: `(label, name, probability)`, most probable first; nothing for an image that cannot be read.
        error: why it cannot be read, or "".
    """

    path: Path
    top: tuple[tuple[int, str, float], ...] = ()
    error: str = ""
    image: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        top = [{"label": label, "name": name, "probability": round(p, 6)} for label, name, p in self.top]
        return {"file": str(self.path), "top": top} | ({"error": self.error} if self.error else {})


def predict(
    opened: OpenedModel,
    paths: Sequence[Path],
    *,
    topk: int = 1,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
) -> list[Prediction]:
    """Predict the classes of image files, in their order.

    Args:
        opened: a model; it is moved to the device.
        paths: of images, see `files.find_images`.
        topk: classes of each image, at most those of the model.
        batch_size: images at a time.
        num_workers: processes that load; 0: this one.
        device: that the model runs on.

    Raises:
        ValueError: topk below 1, or no image can be read.
    """
    if topk < 1:
        raise ValueError(f"topk={topk} must be at least 1")
    names = opened.names
    words = describe_classes(names)
    shown = [words.get(name, name) for name in names]
    opened.model.to(device)
    made: list[Prediction] = []
    for images, places, reasons in iterate(paths, opened, batch_size=batch_size, num_workers=num_workers):
        shares, labels = opened.probabilities(images.to(device)).cpu().topk(min(topk, opened.num_classes))
        pixels = opened.denormalize(images) if len(made) < MOST_SHOWN else [None] * len(images)
        for place, why, share, label, image in zip(
            places.tolist(), reasons, shares.tolist(), labels.tolist(), pixels, strict=True
        ):
            top = tuple((number, shown[number], p) for number, p in zip(label, share, strict=True))
            made.append(Prediction(paths[place], () if why else top, why, None if why else image))
    if all(prediction.error for prediction in made):
        raise ValueError(f"none of {len(made)} images can be read; the first is {made[0].path}: {made[0].error}")
    return made


def write_predictions(predictions: Sequence[Prediction], path: Path) -> Path:
    """Writes a .csv file: `file`, then `prediction`, `probability` and, with more, `prediction_2`, `probability_2`, …;
    `error` where an image could not be read."""
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
        titles=[f"{prediction.top[0][1]} {100 * prediction.top[0][2]:.0f} %" for prediction in shown],
        title=title or f"{len(shown)} of {len(predictions)} images" * (len(shown) < len(predictions)),
        path=path,
    )
