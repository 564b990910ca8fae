"""JPEG files of handwritten digits as somebody would photograph them: chalk on coloured boards, under uneven light."""

from pathlib import Path

import numpy as np
from foveal.zoo.data.digits import split_digits
from PIL import Image
from sklearn.datasets import load_digits

TRAIN = 200  # files; 160 more are held out
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def photograph_digits(root: Path, *, side: int = 64) -> Path:
    """Writes `root/train/DIGIT/*.jpg` and `root/val/DIGIT/*.jpg` from scans that no shipped weights have seen."""
    rng = np.random.default_rng(0)
    pixels = load_digits().images / 16  # [1797, 8, 8]
    numbers, digits = split_digits()["test"]
    for place, (number, digit) in enumerate(zip(numbers, digits, strict=True)):
        scan = Image.fromarray(pixels[number].astype(np.float32))
        ink = np.asarray(scan.resize((side, side), Image.Resampling.BICUBIC))
        paper, pen = rng.uniform(0.0, 0.3, 3), rng.uniform(0.7, 1.0, 3)
        light = np.linspace(*rng.uniform(0.6, 1.0, 2), side)[None, :, None]
        picture = (paper + (pen - paper) * ink.clip(0, 1)[..., None]) * light + rng.normal(0, 0.02, (side, side, 3))
        folder = root / ("train" if place < TRAIN else "val") / NAMES[digit]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * picture.clip(0, 1)).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
    return root
