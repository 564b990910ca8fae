"""Discs, squares and triangles over crops of scikit-learn's two photographs, with their masks: no download."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .classes import ClassTable
from .loader import mix_seed
from .masks import MaskData, Pair

NAMES = ("ground", "disc", "square", "triangle")
COLOURS = ((200, 60, 60), (60, 160, 70), (70, 90, 200))  # of shapes, and each of them is up to 40 off
PHOTOS = ("china.jpg", "flower.jpg")
SPLITS = ("train", "val", "test")


@cache
def _photo(name: str) -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(name))


def draw_shapes(split: str, number: int, *, size: int) -> tuple[Image.Image, np.ndarray]:
    """An image and its labels; the same ones for the same split and number.

    Sides are `size` of images to train on, and within a quarter of it otherwise.
    """
    place = SPLITS.index(split)
    draw = np.random.default_rng(mix_seed(place, number))
    height, width = (size, size) if split == "train" else draw.integers(size * 3 // 4, size * 5 // 4 + 1, 2).tolist()
    photo = _photo(PHOTOS[int(draw.integers(2))])
    half = photo.width // 2
    left = int(draw.integers(half - width)) + (0 if split == "train" else half)
    top = int(draw.integers(photo.height - height))
    image, mask = photo.crop((left, top, left + width, top + height)), Image.new("L", (width, height))
    brushes = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    for _ in range(int(draw.integers(1, 4))):
        label, radius = int(draw.integers(1, 4)), draw.uniform(size / 6, size / 3)
        x, y = draw.uniform(0, width), draw.uniform(0, height)
        colour = tuple(int(c) for c in draw.integers(-40, 41, 3) + COLOURS[label - 1])
        for brush, fill in zip(brushes, (colour, label), strict=True):
            if label == 1:
                brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
            else:
                corners = {"n_sides": 6 - label, "rotation": 0}
                brush.regular_polygon((x, y, radius), fill=fill, **corners)
    return image, np.asarray(mask).astype(np.int64)


class Shapes(MaskData):
    """Photographs with shapes on them; four classes, the ground included.

    Shapes to train on lie on the left halves of the photographs, those to validate and test on on the right halves.

    Args:
        batch_size, seed, shuffle, num_workers: see `ImageData`.
        img_size: pixels a side of images to train on; others are smaller and larger.
        train_length, val_length, test_length: images of a split.
        augment: resize, turn and recolour training images at random.
    """

    def __init__(
        self,
        *,
        batch_size: int = 16,
        img_size: int = 64,
        train_length: int = 640,
        val_length: int = 40,
        test_length: int = 160,
        augment: bool = True,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int | None = 0,
    ):
        self.lengths = {"train": train_length, "val": val_length, "test": test_length}
        for split, length in self.lengths.items():
            if length < 1:
                raise ValueError(f"data.{split}_length={length} must be at least 1")
        super().__init__(
            batch_size=batch_size,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            num_classes=len(NAMES),
            img_size=img_size,
            classes=ClassTable(NAMES),
            scale=(0.8, 1.25),
            hflip=0.5,
            color_jitter=0.3,
            eval_size=None,
            augment=augment,
            seed=seed,
            shuffle=shuffle,
            num_workers=num_workers,
        )
        if not 16 <= img_size <= 256:
            raise ValueError(f"data.img_size={img_size} must be 16 to 256, for the photographs")

    def pairs_of(self, split: str) -> Sequence[Pair]:
        return [(split, str(number)) for number in range(self.lengths[split])]

    def read(self, pair: Pair) -> tuple[Image.Image, Any]:
        return draw_shapes(pair[0], int(pair[1]), size=self.img_size)
