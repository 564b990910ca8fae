"""Trained segmenters in use: open one from its run, and name the pixels of images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

from ...weights import WeightsError, check_state_dict
from ...weights.load import parameters
from ...weights.read import read
from ..data.loader import PADDING
from ..data.masks import IMAGES, MASKS, find_folder, list_pairs, match, read_mask
from ..data.pixels import Mode, UnreadableImage, mode_of, read_image, to_mode
from ..segmentation import Segmenter
from ..tasks.confusion import count_confusion, write_csv
from ..tasks.export import checkpoint_of
from ..tasks.mask_report import summarize, write_pixels
from ..tasks.plots import palette
from ..tasks.segmentation import CONFIG, make_segmenter
from .source import OpenedModel


@dataclass(frozen=True)
class OpenedSegmenter:
    """A trained segmenter in evaluation mode, and how its images are prepared.

    Attributes:
        model: `[B, C, H, W]` → logits `[B, num_classes, H, W]`.
        class_names: by label.
        mean, std: per channel, in units of pixel/255.
        eval_size: pixels of the shorter side that images are brought to; None: their own.
        img_size: pixels a side of its training crops.
    """

    model: Segmenter
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_size: int | None = None
    img_size: int = 512

    @property
    def mode(self) -> Mode:
        """Pillow's mode of its images: "RGB" or "L"."""
        return mode_of(self.mean)

    def as_model(self, source: str) -> OpenedModel:
        """Itself for `export_onnx` and `export_program`: images of the size of evaluation, else of training crops."""
        side = self.eval_size or self.img_size
        images = {"input_size": (len(self.mean), side, side), "mean": self.mean, "std": self.std}
        return OpenedModel(self.model, source, self.class_names, images, targets="masks")

    @torch.inference_mode()
    def predict(self, image: Image.Image) -> Tensor:
        """Labels `[H, W]` (int64) of an image of any mode and size, at its own size."""
        device = next(self.model.parameters()).device
        pixels = V.to_dtype(V.to_image(to_mode(image, self.mode)), torch.float32, scale=True)
        if self.eval_size is not None:
            pixels = V.resize(pixels, [self.eval_size], antialias=True)
        logits = self.model(V.normalize(pixels, list(self.mean), list(self.std))[None].to(device)).float()
        size = (image.height, image.width)
        if logits.shape[2:] != size:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits.argmax(dim=1)[0].cpu()


def holds_segmenter(run: str | Path) -> bool:
    """Return whether a run or a checkpoint is of `task=segmentation`."""
    data = read(checkpoint_of(Path(run)))
    return isinstance(data, Mapping) and isinstance(data.get(CONFIG), Mapping)


def open_segmenter(run: str | Path, *, eval_size: int | None = None, container: str | None = None) -> OpenedSegmenter:
    """The model of a run of `task=segmentation`, on the CPU and in evaluation mode.

    Args:
        run: folder of a run, whose `checkpoints/last.ckpt` is taken, or a checkpoint.
        eval_size: pixels of the shorter side that images are brought to; None: as the run was evaluated.
        container: key of the checkpoint that holds other weights than the averaged ones.

    Raises:
        WeightsError: no checkpoint, or not one of this task.
        ValueError: a size below 1.
    """
    if eval_size is not None and eval_size < 1:
        raise ValueError(f"eval_size={eval_size} must be at least 1")
    path = checkpoint_of(Path(run))
    data = read(path)
    config: Any = data.get(CONFIG) if isinstance(data, Mapping) else None
    if not isinstance(config, Mapping):
        raise WeightsError(f"{path} holds no model of task=segmentation")
    made = {key: config[key] for key in ("num_classes", "in_chans", "img_size", "head")}
    model = make_segmenter(config["model"], **made)
    weights = parameters(data, container, path)
    check_state_dict(weights, model.state_dict(), problem=f"{path} does not fit {config['model']['name']}")
    model.load_state_dict(weights)
    facts = {key: tuple(config[key]) for key in ("class_names", "mean", "std")}
    sizes = {"eval_size": eval_size or config["eval_size"], "img_size": config["img_size"] or OpenedSegmenter.img_size}
    return OpenedSegmenter(model.eval(), **facts, **sizes)


@dataclass(frozen=True)
class MaskEvaluation:
    """Counts of pixels whose classes are known.

    Attributes:
        class_names: by label.
        confusion: pixels `[num_classes, num_classes]`; row: true class, column: predicted class.
        num_images: that could be read.
        unreadable: reasons by path of images and masks that do not count.
    """

    class_names: tuple[str, ...]
    confusion: Tensor
    num_images: int
    unreadable: dict[str, str]

    @property
    def summary(self) -> dict[str, Any]:
        """`miou` and `acc` in percent, and counts."""
        means = {name: round(100 * value, 4) for name, value in summarize(self.confusion, self.class_names).items()}
        counts = {"num_images": self.num_images, "num_classes": len(self.class_names)}
        return means | counts | {"unreadable": len(self.unreadable)}

    def write(self, folder: Path) -> list[Path]:
        """Writes `summary.json`, `per_class.csv`, `confusion.csv` and `confusion.png`, and where images could not be
        read `unreadable.csv`; returns the paths."""
        folder.mkdir(parents=True, exist_ok=True)
        summary = folder / "summary.json"
        summary.write_text(json.dumps(self.summary, indent=2) + "\n", encoding="utf-8")
        written = [summary, *write_pixels(self.confusion, self.class_names, folder)]
        if self.unreadable:
            written.append(write_csv(folder / "unreadable.csv", [["file", "reason"], *self.unreadable.items()]))
        return written


def find_pairs(root: str | Path, *, split: str | None = None) -> list[tuple[str, str]]:
    """Images and masks of a folder as `data=maskfolder` has them: of the split, else of test, else of val.

    Raises:
        FileNotFoundError, ValueError: no such folder or split.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root} is not a folder; expected one with images/*.jpg and masks/*.png")
    both = [find_folder(Path(root), names) for names in (IMAGES, MASKS)]
    if split is None and both[0] is not None and both[1] is not None and not any(map(Path.is_dir, both[0].iterdir())):
        return match(both[0], both[1])
    parts = list_pairs(Path(root), fraction=0.5, seed=0)
    chosen = split or ("test" if "test" in parts else "val")
    if chosen not in parts:
        raise ValueError(f"{root} has no folder for the split {chosen!r}; it has {', '.join(parts)}")
    return parts[chosen]


def evaluate_masks(
    opened: OpenedSegmenter,
    pairs: Iterable[tuple[str, str]],
    *,
    ignore: Iterable[int] = (255,),
    device: str | torch.device = "cpu",
) -> MaskEvaluation:
    """Predict the class of every pixel and compare, at the size of each mask.

    Args:
        opened: a model; it is moved to the device.
        pairs: paths of images and masks, see `find_pairs`.
        ignore: values of masks that do not count.
        device: that the model runs on.

    Raises:
        ValueError: no pair can be read.
    """
    opened.model.to(device)
    count, seen, unreadable = len(opened.class_names), 0, {}
    confusion = torch.zeros(count, count, dtype=torch.long)
    for path, mask in pairs:
        try:
            image = read_image(path, opened.mode)
            labels = torch.from_numpy(read_mask(mask, num_classes=count, ignore=list(ignore)))
            if labels.shape != (image.height, image.width):
                raise UnreadableImage(mask, f"it is not of the size of its image, {image.width}x{image.height} pixels")
        except UnreadableImage as error:
            unreadable[error.name] = error.reason
            continue
        found, real = opened.predict(image), labels != PADDING
        confusion += count_confusion(labels[real], found[real], count)
        seen += 1
    if not seen:
        first, why = next(iter(unreadable.items()))
        raise ValueError(f"none of the images and masks can be read; the first is {first}: {why}")
    return MaskEvaluation(opened.class_names, confusion, seen, unreadable)


def write_masks(
    opened: OpenedSegmenter, paths: Iterable[Path], folder: Path, *, device: str | torch.device = "cpu"
) -> tuple[list[Path], dict[str, str]]:
    """Writes the predicted mask of each image to a folder, `NAME.png` with a palette whose numbers are the labels.

    Args:
        opened: a model; it is moved to the device.
        paths: of images; of equal names later ones get a number.
        folder: made where it is missing.
        device: that the model runs on.

    Returns:
        written: paths of the masks, in the order of the images that could be read.
        unreadable: reasons by path of the others.

    Raises:
        ValueError: no image can be read.
    """
    opened.model.to(device)
    folder.mkdir(parents=True, exist_ok=True)
    colours = [channel for colour in palette(256) for channel in colour]
    written: list[Path] = []
    unreadable: dict[str, str] = {}
    for path in paths:
        try:
            image = read_image(path, opened.mode)
        except UnreadableImage as error:
            unreadable[error.name] = error.reason
            continue
        mask = Image.fromarray(opened.predict(image).to(torch.uint8).numpy())
        mask.putpalette(colours)
        target, number = folder / f"{path.stem}.png", 1
        while target in written:
            number += 1
            target = folder / f"{path.stem}_{number}.png"
        mask.save(target)
        written.append(target)
    if not written:
        path, why = next(iter(unreadable.items()))
        raise ValueError(f"none of {len(unreadable)} images can be read; the first is {path}: {why}")
    return written, unreadable
