"""Clips of a handwritten digit that moves in one direction, with a caption such as "a 3 moves left"; no download."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .base import SeededData
from .digits import split_digits
from .loader import PADDING, SeededDataset, mix_seed
from .spec import DataSpec

WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
WORDS = ("a", "moves", *WAYS, *map(str, range(10)))
FIRST = 3  # number of the first word; 0 is the end of a caption, 1 a mask, 2 the start
LENGTH = 5  # words of a caption, and its end
FIXED_SEEDS = {"val": 0, "test": 1}  # of the motions of held-out clips


def caption_of(digit: int, way: str) -> Tensor:
    """Numbers of the words, int64 `[LENGTH]`."""
    return torch.tensor([FIRST + WORDS.index(word) for word in ("a", str(digit), "moves", way)] + [0])


class CaptionedClips(Dataset):
    """Clip `i` shows scan `i % len(scans)`; way and place are PyTorch's draw, or follow from `fixed_seed`."""

    def __init__(
        self, scans: np.ndarray, labels: list[int], *, length: int, canvas: int, frames: int, fixed_seed: int | None
    ):
        self.scans, self.labels, self.length, self.fixed_seed = torch.from_numpy(scans), labels, length, fixed_seed
        self.canvas, self.frames = canvas, frames

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        which, generator = index % len(self.scans), None
        if self.fixed_seed is not None:
            generator = torch.Generator().manual_seed(mix_seed(self.fixed_seed, index))
        way = list(WAYS)[int(torch.randint(4, (), generator=generator))]
        room, travel = self.canvas - self.scans.shape[-1], self.frames - 1
        starts = []
        for step in WAYS[way]:  # such that the whole way lies on the canvas
            low, high = (travel if step < 0 else 0), (room - travel if step > 0 else room)
            starts.append(int(torch.randint(low, high + 1, (), generator=generator)))
        clip, side = torch.zeros(1, self.frames, self.canvas, self.canvas), self.scans.shape[-1]
        for t in range(self.frames):
            top, left = (start + t * step for start, step in zip(starts, WAYS[way], strict=True))
            clip[0, t, top : top + side, left : left + side] = self.scans[which]
        return clip, caption_of(self.labels[which], way)


class SeededCaptions(SeededDataset):
    """Clips that depend on (seed, epoch, index) only; words are PADDING in one that fills a batch."""

    def __getitem__(self, key: tuple[int, int | None]) -> Any:
        clip, words = self.draw(key)
        return clip, torch.full_like(words, PADDING) if key[1] is None else words


class CaptionedDigits(SeededData):
    """Clips `[B, 1, frames, canvas, canvas]` in 0..1 with captions, int64 `[B, LENGTH]`; splits share no scan.

    Args:
        canvas: pixels a side; the digit of 8 pixels goes a pixel a frame.
        frames: of a clip.
        epoch_length, val_length, test_length: clips; those to train on are drawn anew in each epoch.
        batch_size, seed, shuffle, num_workers: see `SeededData`.

    Raises:
        ValueError: a canvas without room for the way.
    """

    item = "videos"
    seeded_dataset = SeededCaptions

    def __init__(
        self,
        *,
        batch_size: int = 64,
        canvas: int = 16,
        frames: int = 6,
        epoch_length: int = 2048,
        val_length: int = 360,
        test_length: int = 720,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int | None = 0,
    ):
        super().__init__(batch_size=batch_size, seed=seed, shuffle=shuffle, num_workers=num_workers)
        if not 2 <= frames <= canvas - 7:
            raise ValueError(f"data.frames={frames} must be 2 to data.canvas={canvas} less 7: the digit has 8 pixels")
        self.canvas, self.frames = canvas, frames
        self.lengths = {"train": epoch_length, "val": val_length, "test": test_length}

    @property
    def spec(self) -> DataSpec:
        return DataSpec(1, (self.frames, self.canvas, self.canvas))

    @property
    def for_task(self) -> dict[str, Any]:
        facts = {"frames": self.frames, "size": self.canvas, "in_chans": 1}
        return facts | {"vocabulary": list(WORDS), "length": LENGTH}

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:
            return
        from sklearn.datasets import load_digits

        scans = (load_digits().images / 16).astype(np.float32)
        for split, (numbers, labels) in split_digits().items():
            options = {"canvas": self.canvas, "frames": self.frames, "fixed_seed": FIXED_SEEDS.get(split)}
            self.datasets[split] = CaptionedClips(scans[numbers], labels, length=self.lengths[split], **options)
