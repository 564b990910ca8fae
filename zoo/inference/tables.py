"""Evaluate a model of labels or of numbers on a table of images: a table per label or value, every prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.tables import as_vectors, find_table, read_targets
from ..tasks.confusion import write_csv
from ..tasks.measured import mean_of, per_label, per_value, write_measured
from .files import iterate
from .source import OpenedModel


@dataclass(frozen=True)
class TableEvaluation:
    """Predictions for images whose labels or values are known.

    Attributes:
        kind: "labels" or "values".
        names: of the T labels or values.
        paths: of the N images that could be read.
        targets: `[N, T]`, 0 or 1 of labels.
        outputs: probabilities or values, `[N, T]`.
        unreadable: reasons by path of images that do not count.
        img_size: pixels a side that the model got.
    """

    kind: str
    names: tuple[str, ...]
    paths: tuple[Path, ...]
    targets: Tensor
    outputs: Tensor
    unreadable: dict[str, str]
    img_size: int

    @property
    def rows(self) -> list[dict[str, Any]]:
        """See `tasks.measured.per_label` and `per_value`."""
        return (per_label if self.kind == "labels" else per_value)(self.outputs, self.targets, self.names)

    @property
    def summary(self) -> dict[str, Any]:
        """Means over labels (`map`, `f1`, percent) or over values (`mae`, `rmse`, `r2`), and counts."""
        keys = {"map": "ap", "f1": "f1"} if self.kind == "labels" else {"mae": "mae", "rmse": "rmse", "r2": "r2"}
        scale, means = (
            100 if self.kind == "labels" else 1,
            {name: mean_of(self.rows, key) for name, key in keys.items()},
        )
        return {
            **{name: None if mean is None else round(scale * mean, 6) for name, mean in means.items()},
            "img_size": self.img_size,
            "num_images": len(self.paths),
            f"num_{self.kind}": len(self.names),
            "unreadable": len(self.unreadable),
        }

    def write(self, folder: Path) -> list[Path]:
        """Writes `summary.json`, `predictions.csv`, and `per_label.csv`, or `per_value.csv` and `values.png`; where
        images could not be read, `unreadable.csv`; returns the paths."""
        folder.mkdir(parents=True, exist_ok=True)
        summary = folder / "summary.json"
        summary.write_text(json.dumps(self.summary, indent=2) + "\n", encoding="utf-8")
        header = ["file", *(f"{name}{what}" for name in self.names for what in (" true", " predicted"))]
        pairs = torch.stack([self.targets, self.outputs], dim=2).flatten(1).tolist()
        rows = [[str(path), *cells] for path, cells in zip(self.paths, pairs, strict=True)]
        written = [summary, *write_measured(self.kind, self.outputs, self.targets, self.names, folder)]
        written.append(write_csv(folder / "predictions.csv", [header, *rows]))
        if self.unreadable:
            written.append(write_csv(folder / "unreadable.csv", [["file", "reason"], *self.unreadable.items()]))
        return written


def list_targets(
    root: str | Path, opened: OpenedModel, *, split: str | None = None, labels: str | None = None, separator: str = "|"
) -> Mapping[Path, list[float]]:
    """Targets of each image of a table, in the order of the model's outputs.

    Args:
        root: folder that files start from.
        opened: a model of labels or values, which knows their names.
        split: rows of it alone; None: test where the table has it, else val, else all.
        labels: the .csv file; None: `root/labels.csv`.
        separator: between the labels of a cell.

    Raises:
        FileNotFoundError, ValueError: no such table, or one without a column that the model predicts.
    """
    table, names = find_table(root, labels), opened.names
    columns = list(names) if opened.targets == "values" else None
    parts, found = read_targets(table, root=Path(root), kind=opened.targets, columns=columns, separator=separator)
    chosen = split or next((name for name in ("test", "val") if parts[name]), None)
    paths = parts[chosen] if chosen else [path for some in parts.values() for path in some]
    if not paths:
        raise ValueError(f"{table} has no rows of the split {split!r}")
    vectors = as_vectors(found, names, where=str(table))
    return {Path(path): vectors[path] for path in paths}


@torch.inference_mode()
def evaluate_table(
    opened: OpenedModel,
    images: Mapping[Path, Sequence[float]],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
) -> TableEvaluation:
    """Predict labels or values of every image and compare.

    Args:
        opened: a model; it is moved to the device.
        images: targets by path, see `list_targets`.
        batch_size: images at a time.
        num_workers: processes that load; 0: this one.
        device: that the model runs on.

    Raises:
        ValueError: no image can be read.
    """
    paths, targets = list(images), torch.tensor(list(images.values()))
    opened.model.to(device)
    outputs, read, unreadable = [], [], {}
    for batch, places, reasons in iterate(paths, opened, batch_size=batch_size, num_workers=num_workers):
        whole = torch.tensor([not reason for reason in reasons])
        unreadable |= {str(paths[i]): why for i, why in zip(places.tolist(), reasons, strict=True) if why}
        outputs.append(opened.predictions(batch.to(device)).cpu()[whole])
        read.append(places[whole])
    kept = torch.cat(read)
    if not len(kept):
        path, why = next(iter(unreadable.items()))
        raise ValueError(f"none of {len(paths)} images can be read; the first is {path}: {why}")
    where = tuple(paths[i] for i in kept.tolist())
    return TableEvaluation(
        opened.targets, opened.names, where, targets[kept], torch.cat(outputs), unreadable, opened.img_size
    )
