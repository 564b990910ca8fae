"""Folders of images as users have them."""

from pathlib import Path

import numpy as np
from foveal.zoo.data.digits import split_digits
from PIL import Image
from sklearn.datasets import load_digits

TRAIN = 200  # files; 160 more are held out
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write(root: Path, *paths: str) -> Path:
    """Images below `root`; file number i has the grey level i."""
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 24), (number % 256,) * 3).save(root / path)
    return root


def both(*names: str, count: int = 1) -> list[str]:
    return [f"{split}/{name}/{i}.png" for split in ("train", "val") for name in names for i in range(count)]


def write_damaged(root: Path) -> Path:
    """Twelve noisy images to train on and six to validate on; of the class ant most give none."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.jpg")
        whole = (root / split / "ant/1.jpg").read_bytes()
        (root / split / "ant/0.jpg").write_bytes(b"")
        (root / split / "ant/1.jpg").write_bytes(whole[: len(whole) // 2])
        (root / split / "ant/2.jpg").write_bytes(b"<html>not found</html>")
    return root


def photograph_digits(root: Path, *, side: int = 64) -> Path:
    """Writes `root/train/DIGIT/*.jpg` and `root/val/DIGIT/*.jpg`: chalk on coloured boards, under uneven light.

    They are made of scans that no shipped weights have seen.
    """
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
