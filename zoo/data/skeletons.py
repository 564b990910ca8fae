"""Drawn skeletons that move smoothly, seen by a camera that stands anywhere around them; no download, and no people."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .base import SeededData
from .loader import PADDING, SeededDataset, mix_seed
from .spec import DataSpec

PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15)  # of the 17 joints that Human3.6M has
BONES = (  # from the parent, in metres at rest: x to the side, y down, z to the front
    (0.0, 0.0, 0.0), (-0.13, 0.0, 0.0), (0.0, 0.45, 0.0), (0.0, 0.45, 0.0), (0.13, 0.0, 0.0), (0.0, 0.45, 0.0),
    (0.0, 0.45, 0.0), (0.0, -0.25, 0.0), (0.0, -0.25, 0.0), (0.0, -0.1, 0.05), (0.0, -0.12, 0.0), (0.15, 0.0, 0.0),
    (0.1, 0.25, 0.0), (0.0, 0.25, 0.05), (-0.15, 0.0, 0.0), (-0.1, 0.25, 0.0), (0.0, 0.25, 0.05),
)  # fmt: skip
BENDS = {3: (-0.5, 0.0, 0.0), 6: (-0.5, 0.0, 0.0), 13: (0.7, 0.0, 0.0), 16: (0.7, 0.0, 0.0)}  # knees back, elbows front
FIXED_SEEDS = {"train": 2, "val": 0, "test": 1}


def turn(axis_angle: Tensor) -> Tensor:
    """Rotations `[…, 3, 3]` of vectors whose length is the angle, `[…, 3]` (Rodrigues)."""
    angle = axis_angle.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    x, y, z = (axis_angle / angle).unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    eye, angle = torch.eye(3, dtype=x.dtype), angle[..., None]
    return eye + angle.sin() * cross + (1 - angle.cos()) * cross @ cross


def move(frames: int, *, swing: float, generator: torch.Generator | None = None) -> Tensor:
    """Joints of one sequence in the camera's axes, `[frames, 17, 3]`, the root at 0.

    Each bone turns about its joint by three angles, a constant and a sine of random frequency and phase each, and takes
    the bones below it along. Knees are bent to the back and elbows to the front: without them the image would not tell
    a pose from its mirror image in depth.

    Args:
        frames: of the sequence, at some 25 a second.
        swing: standard deviation of angles in radians.
        generator: PyTorch's default generator if None.
    """
    count, time = len(PARENTS), torch.arange(frames) / 25
    still, size = (swing * torch.randn(count, 3, generator=generator) for _ in range(2))
    rate = 0.3 + torch.rand(count, 3, generator=generator)  # turns a second
    phase = torch.rand(count, 3, generator=generator)
    bends = torch.zeros(count, 3)
    for joint, bend in BENDS.items():
        bends[joint] = torch.tensor(bend)
    angles = bends + still + size * (2 * math.pi * (rate * time[:, None, None] + phase)).sin()  # [frames, 17, 3]
    yaw = 2 * math.pi * torch.rand((), generator=generator)
    turns, places = [turn(torch.stack([torch.zeros(()), yaw, torch.zeros(())])).expand(frames, 3, 3)], []
    local = turn(angles)
    for joint, parent in enumerate(PARENTS):
        if parent < 0:
            places.append(torch.zeros(frames, 3))
            continue
        turns.append(turns[parent] @ local[:, joint])
        places.append(places[parent] + turns[joint] @ torch.tensor(BONES[joint]))
    return torch.stack(places, dim=1)


class Sequences(Dataset):
    """Sequence `i` follows from a fixed seed and `i`."""

    def __init__(self, length: int, *, frames: int, swing: float, fixed_seed: int):
        self.length, self.fixed_seed, self.options = length, fixed_seed, {"frames": frames, "swing": swing}
        self.made: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        if index not in self.made:
            generator = torch.Generator().manual_seed(mix_seed(self.fixed_seed, index))
            self.made[index] = move(**self.options, generator=generator)
        return self.made[index]


class SeededSequences(SeededDataset):
    """Poses in the image, in space, and PADDING in a sequence that fills a batch."""

    def __getitem__(self, key: tuple[int, int | None]) -> Any:
        joints = self.draw(key)
        return joints[..., :2], joints, PADDING if key[1] is None else 0


class Skeletons(SeededData):
    """Batches of poses in the image `[B, frames, 17, 2]` and in space `[B, frames, 17, 3]`, in metres from the root.

    The camera is orthographic and level; no person was measured.

    Args:
        frames: of a sequence.
        swing: standard deviation of angles in radians.
        train_length, val_length, test_length: sequences of a split.
        batch_size, seed, shuffle, num_workers: see `SeededData`.

    Raises:
        ValueError: fewer than two frames.
    """

    item = "sequences"
    seeded_dataset = SeededSequences

    def __init__(
        self,
        *,
        batch_size: int = 64,
        frames: int = 27,
        swing: float = 0.3,
        train_length: int = 2048,
        val_length: int = 256,
        test_length: int = 512,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int | None = 0,
    ):
        super().__init__(batch_size=batch_size, seed=seed, shuffle=shuffle, num_workers=num_workers)
        if frames < 2:
            raise ValueError(f"data.frames={frames} must be at least 2")
        self.frames, self.swing = frames, swing
        self.lengths = {"train": train_length, "val": val_length, "test": test_length}

    @property
    def spec(self) -> DataSpec:
        return DataSpec(2, (self.frames, len(PARENTS)))

    @property
    def for_task(self) -> dict[str, Any]:
        return {"frames": self.frames, "joints": len(PARENTS)}

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:
            return
        for split, length in self.lengths.items():
            options = {"frames": self.frames, "swing": self.swing, "fixed_seed": FIXED_SEEDS[split]}
            self.datasets[split] = Sequences(length, **options)
