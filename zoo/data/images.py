"""Image folders, and every dataset that timm reads, with timm's transforms."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from timm.data import create_dataset, create_transform
from timm.data.constants import (
    DEFAULT_CROP_MODE,
    DEFAULT_CROP_PCT,
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
)

from .base import ImageData
from .names import unknown_name

READERS = {
    "hfds": "datasets",
    "hfids": "datasets",
    "tfds": "tensorflow_datasets",
    "wds": "webdataset",
    "torch": "torchvision",
}
TORCH_NAMES = (
    ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
    + ("inaturalist", "places365", "imagenet", "image_folder")
)  # fmt: skip
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
    "test": ("test", "testing"),
}


def _split_folder(root: Path, split: str) -> Path:
    names = next((folders for folders in SPLIT_FOLDERS.values() if split in folders), ())
    for name in (split, *names):
        if (root / name).is_dir():
            return root / name
    found = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:8]) or "no folder at all"
    raise FileNotFoundError(f"data.root={str(root)!r} has no folder for the split {split!r}; it holds {found}")


class TimmDataset(ImageData):
    """Any dataset that `timm.data.create_dataset` reads.

    Args:
        name: `torch/cifar10`, `hfds/user/name`, `wds/name`, `tfds/name`, `hfids/user/name`, or "" for an image folder
            (or tar). `wds/`, `tfds/` and `hfids/` are streams: they resume at an epoch, not inside one.
        root: where the data lies, or is cached.
        batch_size, mean, std, num_classes, seed, shuffle, num_workers: see `ImageData`.
        img_size: pixels a side that the model gets.
        train_split, val_split, test_split: names of the splits; without `test_split` the test is on `val_split`.
        train_transform, eval_transform: further arguments of `timm.data.create_transform`, such as
            `auto_augment="rand-m9-mstd0.5-inc1"`, `re_prob=0.25`, `crop_pct=0.875`.
        download: let the reader download what is missing.
        options: further arguments of `timm.data.create_dataset`, such as `input_key`.
        augment: off, training images are only resized and cropped as in evaluation.

    Raises:
        ValueError: the name has an unknown prefix or names an unknown torchvision dataset.
        FileNotFoundError: `root` is not there.
        ImportError: the package that reads this kind of dataset is not installed.
    """

    def __init__(
        self,
        *,
        name: str,
        root: str | None,
        batch_size: int,
        num_classes: int,
        img_size: int = 224,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str | None = None,
        train_transform: Mapping[str, Any] | None = None,
        eval_transform: Mapping[str, Any] | None = None,
        download: bool = False,
        options: Mapping[str, Any] | None = None,
        augment: bool = True,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 8,
    ):
        super().__init__(
            batch_size=batch_size,
            mean=mean,
            std=std,
            num_classes=num_classes,
            seed=seed,
            shuffle=shuffle,
            num_workers=num_workers,
        )
        self.dataset_name, self.root, self.img_size = name, root, img_size
        self.splits = {"train": train_split, "val": val_split, "test": test_split or val_split}
        self.transforms = {"train": dict(train_transform or {}), "eval": dict(eval_transform or {})}
        self.download, self.options, self.augment = download, dict(options or {}), augment
        self._check_name()
        for is_training in (True, False):
            self._transform(is_training)

    def _check_name(self) -> None:
        name = self.dataset_name
        prefix, _, rest = name.partition("/")
        if name and prefix not in READERS:
            raise unknown_name("data.name", name, [f"{kind}/{rest or 'NAME'}" for kind in READERS])
        if prefix == "torch" and rest not in TORCH_NAMES:
            raise unknown_name("data.name", name, [f"torch/{known}" for known in TORCH_NAMES])
        if name and find_spec(READERS[prefix]) is None:
            package = READERS[prefix]
            raise ImportError(f"data.name={name!r} is read by the package {package}: pip install {package}")
        if not name or (prefix in ("torch", "wds") and not self.download):
            if self.root is None:
                raise ValueError(f"data.root is not set: pass the folder that holds {name or 'the images'}")
            if "://" not in self.root and not Path(self.root).exists():
                raise FileNotFoundError(f"data.root={self.root!r} does not exist")

    def _transform(self, is_training: bool):
        key = "train" if is_training else "eval"
        try:
            return create_transform(
                self.img_size, is_training=is_training, mean=self.mean, std=self.std, **self.transforms[key]
            )
        except TypeError as error:
            raise TypeError(f"data.{key}_transform={self.transforms[key]}: {error}") from error

    def _create(self, split: str, *, is_training: bool):
        return create_dataset(
            self.dataset_name,
            root=self.root,
            split=self.splits[split],
            is_training=is_training,
            batch_size=self.batch_size,
            seed=self.seed,
            download=self.download,
            **self.options,
        )

    @property
    def preprocessing(self) -> dict[str, Any]:
        given = self.transforms["eval"]
        crop = {
            "crop_pct": given.get("crop_pct") or DEFAULT_CROP_PCT,
            "crop_mode": given.get("crop_mode") or DEFAULT_CROP_MODE,
            "interpolation": given.get("interpolation", "bilinear"),  # the default of create_transform
        }
        return super().preprocessing | crop

    def prepare_data(self) -> None:
        if self.download:
            for split in self.splits:
                self._create(split, is_training=split == "train")

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:
            return
        for split in self.splits:
            dataset = self._create(split, is_training=split == "train")
            dataset.transform = self._transform(split == "train" and self.augment)
            self.datasets[split] = dataset


class ImageFolder(TimmDataset):
    """Images in folders: `root/train/CLASS/*.jpg`, `root/val/CLASS/*.jpg`, and `root/test/CLASS/*.jpg` if there is one.

    Args:
        root: the folder; `validation`, `valid`, `eval` are accepted for `val`.
        num_classes: by default the number of folders under `train`.
        batch_size, img_size, mean, std, train_transform, eval_transform, augment, seed, shuffle, num_workers: see
            `TimmDataset`.

    Raises:
        ValueError: no root, or the training folder holds no class folders.
        FileNotFoundError: the root or one of the splits is not there.
    """

    def __init__(
        self,
        *,
        root: str | None,
        batch_size: int,
        num_classes: int | None = None,
        img_size: int = 224,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
        train_transform: Mapping[str, Any] | None = None,
        eval_transform: Mapping[str, Any] | None = None,
        augment: bool = True,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 8,
    ):
        if root is None:
            raise ValueError(
                "data.root is not set: pass data.root=FOLDER, which holds train/CLASS/*.jpg and val/CLASS/*.jpg"
            )
        if not Path(root).is_dir():
            raise FileNotFoundError(f"data.root={root!r} is not a folder")
        folders = {split: _split_folder(Path(root), split) for split in ("train", "val")}
        classes = sorted(p.name for p in folders["train"].iterdir() if p.is_dir())
        if not classes:
            raise ValueError(f"data.root={root!r}: {folders['train']} holds no folder per class")
        has_test = any((Path(root) / name).is_dir() for name in SPLIT_FOLDERS["test"])
        super().__init__(
            name="",
            root=root,
            batch_size=batch_size,
            num_classes=num_classes or len(classes),
            img_size=img_size,
            mean=mean,
            std=std,
            train_split=folders["train"].name,
            val_split=folders["val"].name,
            test_split=_split_folder(Path(root), "test").name if has_test else None,
            train_transform=train_transform,
            eval_transform=eval_transform,
            augment=augment,
            seed=seed,
            shuffle=shuffle,
            num_workers=num_workers,
        )
        if self.num_classes == len(classes):
            self.class_names = classes
