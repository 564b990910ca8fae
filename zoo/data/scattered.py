"""Several handwritten digits on one canvas, with the digits that occur as labels; no download."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .base import SeededData
from .digits import split_digits
from .loader import SeededDataset, mix_seed
from .moving_digits import resize_scans
from .spec import DataSpec

MEAN, STD = 0.12, 0.27  # of the pixels of canvases of 64 with digits of 20
FIXED_SEEDS = {"val": 0, "test": 1}  # of the canvases of held-out scans


def scatter(scans: np.ndarray, labels: np.ndarray, *, canvas: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Four scans, one somewhere in each quarter of a canvas.

    Args:
        scans: `[N, side, side]` in 0..1, sides at most half of the canvas.
        labels: of the scans.
        canvas: pixels a side.
        draw: which scans, and where.

    Returns:
        image `[1, canvas, canvas]` in 0..1, and the digits that occur, float `[10]`.
    """
    image, found, side, half = np.zeros((1, canvas, canvas), np.float32), torch.zeros(10), scans.shape[1], canvas // 2
    for quarter, which in enumerate(draw.integers(len(scans), size=4)):
        top, left = (int(x) for x in draw.integers(half - side + 1, size=2) + half * np.array(divmod(quarter, 2)))
        image[0, top : top + side, left : left + side] = scans[which]
        found[labels[which]] = 1.0
    return torch.from_numpy(image), found


class Scattered(Dataset):
    """Canvases of random scans; with `fixed_seed` canvas `i` is always the same."""

    def __init__(self, scans: np.ndarray, labels: np.ndarray, *, length: int, canvas: int, fixed_seed: int | None):
        self.scans, self.labels, self.length, self.canvas, self.fixed_seed = scans, labels, length, canvas, fixed_seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        seed = mix_seed(self.fixed_seed, index) if self.fixed_seed is not None else np.random.randint(2**31)
        image, found = scatter(self.scans, self.labels, canvas=self.canvas, draw=np.random.default_rng(seed))
        return (image - MEAN) / STD, found


class SeededScattered(SeededDataset):
    """Canvases that depend on (seed, epoch, index) only; labels are NaN in one that fills a batch."""

    def __getitem__(self, key: tuple[int, int | None]) -> Any:
        image, labels = self.draw(key)
        return image, torch.full_like(labels, torch.nan) if key[1] is None else labels


class ScatteredDigits(SeededData):
    """Canvases `[B, 1, canvas, canvas]` of four digits, normalized, and the digits that occur `[B, 10]`.

    Splits share no scan.

    Args:
        canvas: pixels a side.
        side: pixels of a digit, 8 to half of the canvas.
        epoch_length, val_length, test_length: canvases; those to train on are drawn anew in each epoch.
        batch_size, seed, shuffle, num_workers: see `SeededData`.

    Raises:
        ValueError: digits that do not fit.
    """

    seeded_dataset = SeededScattered

    def __init__(
        self,
        *,
        batch_size: int = 64,
        canvas: int = 64,
        side: int = 20,
        epoch_length: int = 3200,
        val_length: int = 200,
        test_length: int = 500,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int | None = 0,
    ):
        super().__init__(batch_size=batch_size, seed=seed, shuffle=shuffle, num_workers=num_workers)
        if not 8 <= side <= canvas // 2:
            raise ValueError(f"data.side={side} must be 8 to half of data.canvas={canvas}")
        self.canvas, self.side = canvas, side
        self.lengths = {"train": epoch_length, "val": val_length, "test": test_length}

    @property
    def spec(self) -> DataSpec:
        return DataSpec(1, (self.canvas, self.canvas), 10, tuple(map(str, range(10))), (MEAN,), (STD,))

    @property
    def for_task(self) -> dict[str, Any]:
        return {"num_classes": 10, "in_chans": 1}

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:
            return
        from sklearn.datasets import load_digits

        scans = resize_scans((load_digits().images / 16).astype(np.float32), self.side)
        for split, (numbers, labels) in split_digits().items():
            options = {"canvas": self.canvas, "fixed_seed": FIXED_SEEDS.get(split)}
            self.datasets[split] = Scattered(scans[numbers], np.array(labels), length=self.lengths[split], **options)
