"""Image files in batches, in their order; one that cannot be read is told and does not stop the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.folders import is_image, scan
from ..data.pixels import UnreadableImage, read_image
from .source import OpenedModel


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are given, and in place of a folder the images below it, hidden ones left out.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: there is no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = scan(path)
            found += [Path(file) for file in [*below.loose, *(image for image, _ in below.images)] if is_image(file)]
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path} does not exist; expected image files or folders of them")
    if not found:
        raise ValueError("there are no images to predict: the folders given hold none")
    return found


class Files(Dataset):
    """`(image [C, H, W], number, reason)` of each file; of one that cannot be read a blank image and the reason."""

    def __init__(self, paths: Sequence[Path], opened: OpenedModel):
        self.paths, self.transform, self.mode = list(paths), opened.transform, opened.mode
        self.blank = torch.zeros(tuple(opened.preprocessing["input_size"]))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        try:
            return self.transform(read_image(self.paths[index], self.mode)), index, ""
        except UnreadableImage as error:
            return self.blank, index, error.reason


def iterate(
    paths: Sequence[Path], opened: OpenedModel, *, batch_size: int, num_workers: int = 0
) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Batches of images `[B, C, H, W]` with their numbers `[B]` and reasons, "" where an image could be read."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
    for images, numbers, reasons in DataLoader(Files(paths, opened), **options):
        yield images, numbers, list(reasons)
