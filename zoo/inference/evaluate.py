"""Evaluate a classifier on a folder of images: accuracy, table per class, confusion matrix, every prediction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import natural_key
from torch import Tensor
from torch.nn import functional as F

from ..data.classes import listed
from ..data.folders import SPLITS, list_table, scan
from ..tasks.confusion import count_confusion, per_class, write_confusion, write_csv
from .files import iterate
from .source import OpenedModel


@dataclass(frozen=True)
class Evaluation:
    """Predictions for images whose classes are known.

    Attributes:
        class_names: by class number.
        paths: of the N images that could be read.
        targets: class numbers `[N]`.
        probabilities: `[N, num_classes]`.
        loss: mean cross-entropy, in nats.
        unreadable: reasons by path of images that do not count.
        img_size: pixels a side that the model got.
    """

    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    targets: Tensor
    probabilities: Tensor
    loss: float
    unreadable: dict[str, str]
    img_size: int

    @property
    def predictions(self) -> Tensor:
        """Class numbers `[N]`."""
        return self.probabilities.argmax(1)

    @property
    def confusion(self) -> Tensor:
        """Counts `[num_classes, num_classes]`; row: true class, column: predicted class."""
        return count_confusion(self.targets, self.predictions, len(self.class_names))

    @property
    def summary(self) -> dict[str, Any]:
        """Numbers named as timm's validate prints them: `top1`, `top5` (percent), `loss`, `img_size`, `num_images`;
        and `per_class`, the mean over classes with images of their accuracy (percent)."""
        count = len(self.targets)
        right = (self.probabilities.topk(min(5, len(self.class_names))).indices == self.targets[:, None]).cpu()
        recalls = [row["recall"] for row in per_class(self.confusion, self.class_names) if row["recall"] is not None]
        return {
            "top1": round(100 * int(right[:, 0].sum()) / count, 4),
            "top5": round(100 * int(right.any(1).sum()) / count, 4),
            "per_class": round(100 * sum(recalls) / len(recalls), 4),
            "loss": round(self.loss, 6),
            "img_size": self.img_size,
            "num_images": count,
            "num_classes": len(self.class_names),
            "unreadable": len(self.unreadable),
        }

    def write(self, folder: Path) -> list[Path]:
        """Writes `summary.json`, `predictions.csv`, `confusion.csv`, `per_class.csv` and `confusion.png`, and where
        images could not be read `unreadable.csv`; returns the paths."""
        folder.mkdir(parents=True, exist_ok=True)
        summary = folder / "summary.json"
        summary.write_text(json.dumps(self.summary, indent=2) + "\n", encoding="utf-8")
        rows = [
            [str(path), self.class_names[target], self.class_names[guess], share, target == guess]
            for path, target, guess, share in zip(
                self.paths,
                self.targets.tolist(),
                self.predictions.tolist(),
                self.probabilities.max(1).values.tolist(),
                strict=True,
            )
        ]
        written = [summary, *write_confusion(self.confusion, self.class_names, folder)]
        written.append(
            write_csv(folder / "predictions.csv", [["file", "true", "predicted", "probability", "right"], *rows])
        )
        if self.unreadable:
            written.append(write_csv(folder / "unreadable.csv", [["file", "reason"], *self.unreadable.items()]))
        return written


def _split_of(root: Path, split: str | None) -> Path:
    """The folder of classes: that of a split where the root has such folders, else the root."""
    folders = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    found = {name: folders[alias] for name, aliases in SPLITS.items() for alias in aliases if alias in folders}
    if split is not None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
        if split not in found:
            raise FileNotFoundError(f"{root} has no folder for the split {split!r}; it holds {listed(folders)}")
        return found[split]
    if not set(folders) <= {alias for aliases in SPLITS.values() for alias in aliases}:
        return root
    return found.get("test") or found.get("val") or found.get("train") or root


def list_labelled(root: str | Path, *, split: str | None = None, labels: str | None = None) -> list[tuple[Path, str]]:
    """Images and names of their classes.

    Args:
        root: folder with `CLASS/*.jpg`, or with `test`, `val` or `train` folders of classes.
        split: of such a root; None: `test` where there is one, else `val`, else `train`.
        labels: a .csv file with the columns `file` (from root) and `label`, in place of folders.

    Raises:
        FileNotFoundError, ValueError: no such folder, or no images in folders of classes.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; expected one with CLASS/*.jpg")
    if labels is not None:
        table = Path(labels) if Path(labels).is_file() else root / labels
        if not table.is_file():
            raise FileNotFoundError(f"labels={labels!r} does not exist, nor in {root}")
        parts = list_table(table, root=root, fraction=0.5, seed=0).images
        chosen = [split] if split is not None else list(parts)
        images = [image for part in chosen for image in parts.get(part, [])]
        images.sort(key=lambda image: (natural_key(image[0]), image[0]))
        return [(Path(path), name) for path, name in images]
    folder = _split_of(root, split)
    images = scan(folder).images
    if not images:
        raise ValueError(f"{folder} holds no images in folders of classes; expected CLASS/*.jpg")
    return [(Path(path), name) for path, name in images]


def number_classes(found: Sequence[str], opened: OpenedModel) -> tuple[tuple[str, ...], dict[str, int]]:
    """Names by number, and the number of every class found.

    A model that knows the names of its classes numbers them by name. Another one numbers the folders in natural order,
    as timm does, when there are as many as the model has classes.

    Raises:
        ValueError: a class that the model does not know, or another number of classes.
    """
    names = tuple(sorted(set(found), key=lambda name: (natural_key(name), name)))
    known = {name: number for number, name in enumerate(opened.names)}
    unknown = [name for name in names if name not in known]
    if not unknown:
        return opened.names, {name: known[name] for name in names}
    if opened.class_names is None and len(names) == opened.num_classes:
        return names, {name: number for number, name in enumerate(names)}
    raise ValueError(
        f"the images are of classes that {opened.source} does not have: {listed(unknown)}; its {opened.num_classes} "
        f"classes are {listed(opened.names)}"
    )


@torch.inference_mode()
def evaluate(
    opened: OpenedModel,
    images: Sequence[tuple[Path, str]],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
) -> Evaluation:
    """Predict the class of every image and compare.

    Args:
        opened: a model; it is moved to the device.
        images: paths and names of classes, see `list_labelled`.
        batch_size: images at a time.
        num_workers: processes that load; 0: this one.
        device: that the model runs on.

    Raises:
        ValueError: no image can be read, or classes that the model does not know.
    """
    names, numbers = number_classes([name for _, name in images], opened)
    paths, targets = [path for path, _ in images], torch.tensor([numbers[name] for _, name in images])
    opened.model.to(device)
    probabilities, read, loss, unreadable = [], [], 0.0, {}
    for batch, places, reasons in iterate(paths, opened, batch_size=batch_size, num_workers=num_workers):
        logits = opened.model(batch.to(device)).float().cpu()
        whole = torch.tensor([not reason for reason in reasons])
        unreadable |= {str(paths[i]): why for i, why in zip(places.tolist(), reasons, strict=True) if why}
        loss += float(F.cross_entropy(logits[whole], targets[places[whole]], reduction="sum"))
        probabilities.append(logits[whole].softmax(1))
        read.append(places[whole])
    kept = torch.cat(read)
    if not len(kept):
        path, why = next(iter(unreadable.items()))
        raise ValueError(f"none of {len(paths)} images can be read; the first is {path}: {why}")
    where = tuple(paths[i] for i in kept.tolist())
    return Evaluation(
        names, where, targets[kept], torch.cat(probabilities), loss / len(kept), unreadable, opened.img_size
    )
