"""The handwritten digits that ship inside scikit-learn: real scans, no download.

1,797 images of 8×8 pixels with 17 grey levels, the test part of the UCI "Optical Recognition of Handwritten Digits"
data (E. Alpaydin and C. Kaynak, 1998, CC BY 4.0): 43 people wrote the whole set, 13 of them this part. It does not
say who wrote which digit, so the split below is by image and the same writers are in all three parts.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

from .base import ImageData

SPLIT_SEED = 0  # the split never changes, whatever the seed of a run: numbers stay comparable
MEAN, STD = (0.5,), (0.5,)


class DigitImages(Dataset):
    """Pairs of `(transform(image), digit)`."""

    def __init__(self, images: list[Image.Image], targets: list[int], transform: v2.Transform):
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.transform(self.images[index]), self.targets[index]


def split_digits() -> dict[str, tuple[list[int], list[int]]]:
    """Image numbers and digits of the fixed, stratified parts: 1,257 to train, 180 to validate, 360 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    targets = load_digits().target
    numbers = list(range(len(targets)))
    rest, test = train_test_split(numbers, test_size=360, stratify=targets, random_state=SPLIT_SEED)
    train, val = train_test_split(rest, test_size=180, stratify=targets[rest], random_state=SPLIT_SEED)
    parts: dict[str, list[int]] = {"train": train, "val": val, "test": test}
    return {name: (part, targets[part].tolist()) for name, part in parts.items()}


class Digits(ImageData):
    """Grey digits `[B, 1, img_size, img_size]`, ten classes.

    Args:
        batch_size, balanced, seed, shuffle, num_workers: see `ImageData`.
        img_size: pixels a side after bicubic resizing.
        augment: turn (±12°), shift (±8 %), scale (0.85 to 1.15) and shear (±8°) training images at random.
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        img_size: int = 32,
        augment: bool = True,
        balanced: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int | None = 0,
    ):
        super().__init__(
            batch_size=batch_size,
            mean=MEAN,
            std=STD,
            num_classes=10,
            img_size=img_size,
            balanced=balanced,
            seed=seed,
            shuffle=shuffle,
            num_workers=num_workers,
        )
        self.augment = augment

    @property
    def preprocessing(self) -> dict[str, Any]:
        return super().preprocessing | {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"}

    @property
    def train_labels(self) -> list[int]:
        return split_digits()["train"][1]

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:
            return
        from sklearn.datasets import load_digits

        pixels = (load_digits().images * (255 / 16)).round().astype("uint8")  # [1797, 8, 8]
        side = (self.img_size, self.img_size)
        images = [Image.fromarray(scan).resize(side, Image.Resampling.BICUBIC) for scan in pixels]
        to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        turn = v2.RandomAffine(
            12, translate=(0.08, 0.08), scale=(0.85, 1.15), shear=8, interpolation=v2.InterpolationMode.BILINEAR
        )
        plain, augmented = v2.Compose(to_tensor), v2.Compose([turn, *to_tensor])
        for name, (numbers, targets) in split_digits().items():
            transform = augmented if name == "train" and self.augment else plain
            self.datasets[name] = DigitImages([images[i] for i in numbers], targets, transform)
