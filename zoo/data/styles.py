"""Pairs of content and style from the two photographs that ship with scikit-learn; no download."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .base import SeededData
from .loader import mix_seed
from .photos import SeededPairs, recolored, sample_photos
from .spec import DataSpec

FIXED_SEEDS = {"val": 0, "test": 1}


class StylePairs(Dataset):
    """Random crops of one photograph and of the other; with `fixed_seed` pair `i` is always the same.

    Pairs to train on have other colors than the photographs, each crop its own.

    Args:
        photos: parts of both photographs, `[3, H, W]` in [0, 1].
        crop: pixels a side.
        length: pairs.
        fixed_seed: see above.
    """

    def __init__(self, photos: list[Tensor], *, crop: int, length: int, fixed_seed: int | None):
        self.photos, self.crop, self.length, self.fixed_seed = photos, crop, length, fixed_seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        seed = mix_seed(self.fixed_seed, index) if self.fixed_seed is not None else np.random.randint(2**31)
        draw, crops = np.random.default_rng(seed), []
        for photo in self.photos:
            top, left = (int(draw.integers(n - self.crop + 1)) for n in photo.shape[1:])
            part = photo[:, top : top + self.crop, left : left + self.crop]
            part = part.flip(2) if draw.integers(2) else part
            crops.append(part if self.fixed_seed is not None else recolored(part))
        content, style = crops[:: 1 if draw.integers(2) else -1]
        return content.contiguous(), style.contiguous()


class PhotoStyles(SeededData):
    """Batches of contents `[B, 3, crop, crop]` and styles of the same shape, each from another photograph.

    Both photographs, a temple and a flower, are halved in size; crops to train on come from their left halves, others
    from their right halves.

    Args:
        crop: pixels a side, 64 or 128.
        epoch_length, val_length, test_length: pairs; those to train on are drawn anew in each epoch.
        batch_size, seed, shuffle, num_workers: see `SeededData`.

    Raises:
        ValueError: another crop.
    """

    seeded_dataset = SeededPairs

    def __init__(
        self,
        *,
        batch_size: int = 4,
        crop: int = 128,
        epoch_length: int = 200,
        val_length: int = 8,
        test_length: int = 32,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int | None = 0,
    ):
        super().__init__(batch_size=batch_size, seed=seed, shuffle=shuffle, num_workers=num_workers)
        if crop not in (64, 128):
            raise ValueError(f"data.crop={crop} must be 64 or 128: half a photograph has 160 columns")
        self.crop, self.lengths = crop, {"train": epoch_length, "val": val_length, "test": test_length}

    @property
    def spec(self) -> DataSpec:
        return DataSpec(3, (self.crop, self.crop))

    @property
    def for_task(self) -> dict[str, Any]:
        return {"in_chans": 3}

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:
            return
        photos = [F.avg_pool2d(x[:, :426], 2) for x in sample_photos()]
        for split, length in self.lengths.items():
            half = slice(0, 160) if split == "train" else slice(160, 320)
            parts = [x[:, :, half] for x in photos]
            options = {"crop": self.crop, "length": length, "fixed_seed": FIXED_SEEDS.get(split)}
            self.datasets[split] = StylePairs(parts, **options)
