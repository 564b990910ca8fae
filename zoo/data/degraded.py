"""Pans over the photographs that ship with scikit-learn, with one degraded quarter of known strength; no download."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .base import SeededData
from .loader import PADDING, SeededDataset, mix_seed
from .spec import DataSpec

KINDS = ("noise", "blur", "blocks")
SPLITS = ("train", "val", "test")
TEXTURE, TRIES = 0.04, 200  # least mean step between pixels of a quarter: a blurred sky is a sky


@cache
def grey_photos() -> tuple[Tensor, ...]:
    """Both photographs at half of their size, `[H, W]` in 0..1."""
    from sklearn.datasets import load_sample_images

    whole = (torch.from_numpy(np.array(x)).float().mean(-1) / 255 for x in load_sample_images().images)
    return tuple(F.avg_pool2d(x[None, None], 2)[0, 0] for x in whole)


def degrade(part: Tensor, kind: str, strength: float, generator: torch.Generator) -> Tensor:
    """Frames `[T, H, W]` with noise, blurred or in blocks of four pixels.

    Args:
        part: values in 0..1.
        kind: one of `KINDS`.
        strength: 0 (as it is) to 1.
        generator: of the noise.
    """
    if kind == "noise":
        return part + 0.3 * strength * torch.randn(part.shape, generator=generator)
    if kind == "blocks":
        coarse = F.avg_pool2d(part[:, None], 4).repeat_interleave(4, 2).repeat_interleave(4, 3)[:, 0]
        return torch.lerp(part, coarse, strength)
    at = torch.arange(-4, 5).float()
    weights = (-at.square() / (2 * (0.1 + 2.4 * strength) ** 2)).exp()
    weights = weights / weights.sum()
    x = F.pad(part[:, None], (4, 4, 4, 4), mode="replicate")
    return F.conv2d(F.conv2d(x, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))[:, 0]


def texture(frame: Tensor) -> float:
    """The least, over the quarters of `[size, size]`, of the mean step between neighbouring pixels."""
    half = frame.shape[-1] // 2
    quarters = frame.unfold(0, half, half).unfold(1, half, half)
    steps = quarters.diff(dim=2).abs().mean((2, 3)) + quarters.diff(dim=3).abs().mean((2, 3))
    return float(steps.min())


class DegradedPans(Dataset):
    """Clip `i` of a split is always the same."""

    def __init__(self, split: str, *, length: int, size: int, frames: int):
        self.split, self.length, self.size, self.frames = split, length, size, frames

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, float, int]:
        seed = mix_seed(SPLITS.index(self.split), index)
        draw, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        for _ in range(TRIES):
            clip = self.pan(draw)
            if texture(clip[0]) > TEXTURE:
                break
        size = self.size
        quarter, strength = int(draw.integers(4)), float(draw.uniform())
        row, column = (size // 2 * x for x in divmod(quarter, 2))
        place = slice(None), slice(row, row + size // 2), slice(column, column + size // 2)
        clip[place] = degrade(clip[place], KINDS[int(draw.integers(3))], strength, generator)
        return clip[None], 1 - strength, quarter

    def pan(self, draw: np.random.Generator) -> Tensor:
        """A clip `[frames, size, size]` of one of the photographs."""
        photo = grey_photos()[int(draw.integers(2))]
        half, travel, size = photo.shape[1] // 2, self.frames - 1, self.size
        top, left = int(draw.integers(photo.shape[0] - size - travel)), int(draw.integers(half - size - travel))
        left += 0 if self.split == "train" else half
        step = draw.integers(2, size=2)  # pixels a frame, down and to the right
        return torch.stack(
            [
                photo[top + t * step[0] : top + t * step[0] + size, left + t * step[1] : left + t * step[1] + size]
                for t in range(self.frames)
            ]
        )


class SeededPans(SeededDataset):
    """Clip, score and quarter; the quarter is PADDING in one that fills a batch."""

    def __getitem__(self, key: tuple[int, int | None]) -> Any:
        clip, score, quarter = self.draw(key)
        return clip, torch.tensor(score, dtype=torch.float32), PADDING if key[1] is None else quarter


class DegradedPhotos(SeededData):
    """Grey clips `[B, 1, frames, size, size]`, scores `[B]` from 0 to 1, and the degraded quarters `[B]`.

    Clips to train on pan over the left halves of the photographs, others over the right halves, where all quarters have
    texture: nothing would show in a smooth one.

    Args:
        size: pixels a side, a multiple of 8 up to 96.
        frames: of a clip.
        train_length, val_length, test_length: clips of a split.
        batch_size, seed, shuffle, num_workers: see `SeededData`.

    Raises:
        ValueError: sizes out of range.
    """

    item = "videos"
    seeded_dataset = SeededPans

    def __init__(
        self,
        *,
        batch_size: int = 32,
        size: int = 32,
        frames: int = 4,
        train_length: int = 1024,
        val_length: int = 128,
        test_length: int = 256,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int | None = 0,
    ):
        super().__init__(batch_size=batch_size, seed=seed, shuffle=shuffle, num_workers=num_workers)
        if size % 8 or not 16 <= size <= 96 or not 1 <= frames <= 32:
            raise ValueError(f"data.size={size} must be a multiple of 8 from 16 to 96, data.frames={frames} 1 to 32")
        self.size, self.frames = size, frames
        self.lengths = {"train": train_length, "val": val_length, "test": test_length}

    @property
    def spec(self) -> DataSpec:
        return DataSpec(1, (self.frames, self.size, self.size))

    @property
    def for_task(self) -> dict[str, Any]:
        return {"in_chans": 1, "size": self.size}

    def setup(self, stage: str | None = None) -> None:
        for split, length in self.lengths.items():
            self.datasets[split] = DegradedPans(split, length=length, size=self.size, frames=self.frames)
