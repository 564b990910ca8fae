"""Handwritten digits that move and bounce: video of ten classes, made from scikit-learn's scans, no download.

After Moving MNIST (Srivastava et al., arXiv:1502.04681), with one digit of the 8×8 scans of `digits.py`.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .digits import split_digits
from .loader import mix_seed
from .video import Item, VideoData

SIDE = 8  # pixels of a scan
MEAN, STD = 0.1365, 0.2942  # of all pixels of 12×12 clips
FIXED_SEEDS = {"val": 0, "test": 1}  # of the motions of held-out clips


def bounce(start: int, velocity: int, frames: int, room: int) -> list[int]:
    """Positions 0..room, one a frame, of something that starts at `start` and bounces at both ends."""
    if room == 0:
        return [0] * frames
    path = [(start + velocity * t) % (2 * room) for t in range(frames)]
    return [min(p, 2 * room - p) for p in path]


def moving_clip(
    digit: np.ndarray, *, canvas: int, frames: int, speed: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """A digit with random start and velocity on a black canvas.

    Args:
        digit: `[side, side]` in 0..1.
        canvas, frames: size of the clip.
        speed: velocities are drawn from all of `{-speed, …, speed}²` but (0, 0), pixels a frame.
        generator: PyTorch's default generator if None.

    Returns:
        `[1, frames, canvas, canvas]` in 0..1.
    """
    side = len(digit)
    room = canvas - side
    start = torch.randint(room + 1, (2,), generator=generator).tolist()
    steps = 2 * speed + 1
    drawn = int(torch.randint(steps * steps - 1, (1,), generator=generator))
    drawn += drawn >= (steps * steps) // 2  # the middle one is standing still
    velocity = drawn // steps - speed, drawn % steps - speed
    rows, columns = (bounce(s, v, frames, room) for s, v in zip(start, velocity, strict=True))
    clip = np.zeros((1, frames, canvas, canvas), dtype=np.float32)
    for t, (y, x) in enumerate(zip(rows, columns, strict=True)):
        clip[0, t, y : y + side, x : x + side] = digit
    return torch.from_numpy(clip)


def resize_scans(scans: np.ndarray, side: int) -> np.ndarray:
    """Scans `[N, 8, 8]` in 0..1 as `[N, side, side]`, bicubic, cut to 0..1."""
    if side == SIDE:
        return scans
    large = F.interpolate(torch.from_numpy(scans)[:, None], size=(side, side), mode="bicubic", align_corners=False)
    return large.clamp(0, 1)[:, 0].numpy()


class MovingDigitClips(Dataset):
    """Clip `i` shows scan `i % len(scans)`; its motion is PyTorch's draw, or follows from `fixed_seed`."""

    def __init__(
        self,
        scans: np.ndarray,
        labels: list[int],
        *,
        length: int,
        canvas: int,
        frames: int,
        speed: int,
        mean: float,
        std: float,
        fixed_seed: int | None,
    ):
        self.scans, self.labels, self.length, self.fixed_seed = scans, labels, length, fixed_seed
        self.motion = {"canvas": canvas, "frames": frames, "speed": speed}
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        which = index % len(self.scans)
        generator = None
        if self.fixed_seed is not None:
            generator = torch.Generator().manual_seed(mix_seed(self.fixed_seed, index))
        clip = moving_clip(self.scans[which], generator=generator, **self.motion)
        return {"video": (clip - self.mean) / self.std, "label": self.labels[which]}


class MovingDigits(VideoData):
    """Grey clips `[B, 1, frames, canvas, canvas]` of one bouncing digit each, ten classes.

    Training (1,257 scans), validation (180) and test (360) share no scan. Training clips are drawn anew in each epoch;
    held-out clips never change, whatever the seed.

    Args:
        batch_size, seed, shuffle, num_workers: see `SeededData`.
        canvas: pixels a side, `side` or more.
        side: pixels of a digit, 8 or more; scans of 8 pixels are enlarged bicubically.
        frames: of a clip.
        speed: see `moving_clip`.
        epoch_length: clips of an epoch.
        val_length, test_length: held-out clips of validation and of the test.
        mean, std: of the pixels; they depend on the canvas.

    Raises:
        ValueError: a size that is too small.
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        canvas: int = 12,
        frames: int = 6,
        speed: int = 1,
        side: int = SIDE,
        epoch_length: int = 8000,
        val_length: int = 360,
        test_length: int = 1000,
        mean: float = MEAN,
        std: float = STD,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
    ):
        for name, value, least in (
            ("side", side, SIDE),
            ("canvas", canvas, side),
            ("frames", frames, 1),
            ("speed", speed, 1),
        ):
            if value < least:
                raise ValueError(f"data.{name}={value} must be at least {least}")
        super().__init__(
            batch_size=batch_size,
            channels=1,
            frames=frames,
            height=canvas,
            width=canvas,
            mean=(mean,),
            std=(std,),
            num_classes=10,
            seed=seed,
            shuffle=shuffle,
            num_workers=num_workers,
        )
        self.speed, self.side = speed, side
        self.lengths = {"train": epoch_length, "val": val_length, "test": test_length}

    @property
    def clip_sizes(self) -> tuple[str, list[tuple[int, ...]]]:
        return f"data.frames={self.frames} and data.canvas={self.height}", [(self.frames, self.height, self.width)]

    def _clips(self, split: str, parts: dict[str, tuple[list[int], list[int]]], scans: np.ndarray) -> MovingDigitClips:
        numbers, labels = parts[split]
        return MovingDigitClips(
            scans[numbers],
            labels,
            length=self.lengths[split],
            canvas=self.height,
            frames=self.frames,
            speed=self.speed,
            mean=self.mean[0],
            std=self.std[0],
            fixed_seed=FIXED_SEEDS.get(split),
        )

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:
            return
        from sklearn.datasets import load_digits

        scans, parts = (load_digits().images / 16).astype(np.float32), split_digits()  # [1797, 8, 8]
        scans = resize_scans(scans, self.side)
        self.datasets = {split: self._clips(split, parts, scans) for split in ("train", "val", "test")}
