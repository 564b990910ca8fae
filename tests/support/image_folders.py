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


def _chalk(rng: np.random.Generator, ink: np.ndarray) -> Image.Image:
    """A picture of ink `[side, side]` in 0..1 as chalk on a coloured board under uneven light."""
    side = len(ink)
    paper, pen = rng.uniform(0.0, 0.3, 3), rng.uniform(0.7, 1.0, 3)
    light = np.linspace(*rng.uniform(0.6, 1.0, 2), side)[None, :, None]
    picture = (paper + (pen - paper) * ink.clip(0, 1)[..., None]) * light + rng.normal(0, 0.02, (side, side, 3))
    return Image.fromarray((255 * picture.clip(0, 1)).astype(np.uint8))


def _scan(number: int, size: int, tilt: float = 0.0) -> np.ndarray:
    """A scan `[size, size]` in 0..1, turned by some degrees."""
    pixels = (load_digits().images[number] / 16).astype(np.float32)
    return np.asarray(
        Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).rotate(tilt, Image.Resampling.BICUBIC)
    )


def write_boards(root: Path, *, train: int = 400, val: int = 160, side: int = 64) -> Path:
    """Boards with one to three digits in their quarters, and what a model may be asked about them.

    `root/labels.csv` names the digits of each board (`label`, such as three|seven); `root/tilts.csv` has for boards of
    one digit its `tilt` in degrees and its `size` in pixels; `root/train/masks` and `root/val/masks` have the label of
    each pixel, 1 + digit where there is ink and 0 elsewhere, `root/classes.txt` their names. No shipped weights have
    seen the scans, and those of train and val are others.
    """
    rng = np.random.default_rng(0)
    numbers, digits = split_digits()["test"]
    named, tilted = ["file,label,split"], ["file,tilt,size,split"]
    for split, count, scans in (("train", train, range(TRAIN)), ("val", val, range(TRAIN, len(numbers)))):
        for part in ("images", "masks", "tilted"):
            (root / split / part).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            ink, mask, half = np.zeros((side, side), np.float32), np.zeros((side, side), np.uint8), side // 2
            chosen = rng.choice(scans, rng.integers(1, 4), replace=False)
            for scan, quarter in zip(chosen, rng.permutation(4), strict=False):
                size = int(rng.integers(side // 3, half + 1))
                top, left = (rng.integers(0, half - size + 1, 2) + half * np.array(divmod(int(quarter), 2))).tolist()
                drawn, place = _scan(numbers[scan], size), np.s_[top : top + size, left : left + size]
                ink[place], mask[place] = drawn, np.where(drawn > 0.4, 1 + digits[scan], 0)
            _chalk(rng, ink).save(root / split / "images" / f"{i}.jpg", quality=90)
            Image.fromarray(mask).save(root / split / "masks" / f"{i}.png")
            names = "|".join(sorted({NAMES[digits[scan]] for scan in chosen}))
            named.append(f"{split}/images/{i}.jpg,{names},{split}")

            scan, size, tilt = rng.choice(scans), int(rng.integers(side // 3, side)), float(rng.uniform(-60, 60))
            top, left = rng.integers(0, side - size + 1, 2)
            ink = np.zeros((side, side), np.float32)
            ink[top : top + size, left : left + size] = _scan(numbers[scan], size, tilt)
            _chalk(rng, ink).save(root / split / "tilted" / f"{i}.jpg", quality=90)
            tilted.append(f"{split}/tilted/{i}.jpg,{tilt:.2f},{size},{split}")
    (root / "labels.csv").write_text("\n".join(named) + "\n")
    (root / "tilts.csv").write_text("\n".join(tilted) + "\n")
    (root / "classes.txt").write_text("\n".join(["board", *NAMES]) + "\n")
    return root
