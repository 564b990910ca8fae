"""Image folders, and every dataset that timm reads, with timm's transforms."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from timm.data import ImageDataset, create_dataset
from timm.data.constants import (
    DEFAULT_CROP_MODE,
    DEFAULT_CROP_PCT,
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
)
from timm.data.readers.reader import Reader

from .augment import make_transform
from .base import ImageData
from .classes import ClassTable, listed, recorded
from .folders import SPLITS, list_images
from .foreign import reason
from .loader import PADDING
from .names import say, unknown_name
from .pixels import GONE, UnreadableImage, decode, read_image

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


class Files(Reader):
    """timm's reader of listed files.

    Args:
        samples: path and target of each.
        root: that names of files are told from.
        class_to_idx: labels by name, where targets are labels.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], *, root: str, class_to_idx: Mapping[str, int] | None = None):
        super().__init__()
        self.root, self.class_to_idx, self.samples = root, dict(class_to_idx or {}), list(samples)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        path, target = self.samples[index]
        return open(path, "rb"), target  # closed by who decodes

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path if absolute else os.path.relpath(path, self.root)


class Images(ImageDataset):
    """timm's dataset; a file that gives no image is an error here, and not replaced by the next one."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """`(transform(image), target)`.

        Raises:
            UnreadableImage: the file cannot be opened or decoded.
        """
        try:
            file, target = self.reader[index]
        except GONE as error:
            raise UnreadableImage(str(error.filename), reason(error)) from error
        with file:  # pyright: ignore[reportOptionalContextManager] - timm's readers are not typed
            image = decode(file, name=str(self.filename(index, absolute=True)), mode=self.input_img_mode)
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            return image, PADDING
        label: Any = target if self.target_transform is None else self.target_transform(target)
        return image, label


class TransformedImages(ImageData):
    """Images with timm's transforms.

    Args:
        train_transform, eval_transform: further arguments of `timm.data.create_transform`, such as
            `auto_augment="rand-m9-mstd0.5-inc1"`, `re_prob=0.25`, `crop_pct=0.875`.
        augment: off, training images are only resized and cropped as in evaluation.
        options: see `ImageData`.

    Raises:
        TypeError, ValueError: the arguments of a transform; the message names the key.
    """

    def __init__(
        self,
        *,
        train_transform: Mapping[str, Any] | None,
        eval_transform: Mapping[str, Any] | None,
        augment: bool,
        **options: Any,
    ):
        super().__init__(**options)
        self.augment, self._eval_options = augment, dict(eval_transform or {})
        self._transforms = {
            is_training: make_transform(
                (train_transform if is_training else eval_transform) or {},
                size=self.img_size,
                mean=self.mean,
                std=self.std,
                mode=self.mode,
                is_training=is_training,
            )
            for is_training in (True, False)
        }

    @property
    def preprocessing(self) -> dict[str, Any]:
        crop = {
            "crop_pct": self._eval_options.get("crop_pct") or DEFAULT_CROP_PCT,
            "crop_mode": self._eval_options.get("crop_mode") or DEFAULT_CROP_MODE,
            "interpolation": self._eval_options.get("interpolation", "bilinear"),  # the default of create_transform
        }
        return super().preprocessing | crop

    def _transform(self, split: str) -> Any:
        return self._transforms[split == "train" and self.augment]


class Relabel:
    """Target in one numbering of classes → target in another."""

    def __init__(self, labels: tuple[int, ...]):
        self.labels = labels

    def __call__(self, target: int) -> int:
        return self.labels[target]


def class_names_of(dataset: Any) -> tuple[str, ...] | None:
    """Names by target, as a dataset of timm or torchvision knows them; None: it does not."""
    numbers = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if numbers and sorted(numbers.values()) == list(range(len(numbers))):
        return tuple(str(name) for name in sorted(numbers, key=numbers.__getitem__))
    classes = getattr(dataset, "classes", None)
    if classes:
        return tuple(name if isinstance(name, str) else ", ".join(map(str, name)) for name in classes)
    return None


class TimmDataset(TransformedImages):
    """Any dataset that `timm.data.create_dataset` reads.

    Args:
        name: `torch/cifar10`, `hfds/user/name`, `wds/name`, `tfds/name`, `hfids/user/name`, or "" for an image folder
            (or tar). `wds/`, `tfds/` and `hfids/` are streams: they resume at an epoch, not inside one.
        root: where the data lies, or is cached.
        batch_size, mean, std, num_classes, img_size, seed, shuffle, num_workers: see `ImageData`.
        train_split, val_split, test_split: names of the splits; without `test_split` the test is on `val_split`.
        train_transform, eval_transform, augment: see `TransformedImages`.
        download: let the reader download what is missing.
        options: further arguments of `timm.data.create_dataset`, such as `input_key`.

    Where the reader knows the names of its classes, those of the training split number them in every split.

    Raises:
        ValueError: the name has an unknown prefix or names an unknown torchvision dataset; `num_classes` is not that of
            the data; a split has a class that training does not have.
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
        num_workers: int | None = None,
    ):
        self.dataset_name, self.root = name, root
        self.splits = {"train": train_split, "val": val_split, "test": test_split or val_split}
        self.download, self.options = download, dict(options or {})
        self._check_name()
        super().__init__(
            batch_size=batch_size,
            mean=mean,
            std=std,
            num_classes=num_classes,
            img_size=img_size,
            train_transform=train_transform,
            eval_transform=eval_transform,
            augment=augment,
            seed=seed,
            shuffle=shuffle,
            num_workers=num_workers,
        )

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

    def _create(self, split: str, *, is_training: bool):
        dataset = create_dataset(
            self.dataset_name,
            root=self.root,
            split=self.splits[split],
            is_training=is_training,
            batch_size=self.batch_size,
            seed=self.seed,
            download=self.download,
            **{"input_img_mode": self.mode, **self.options},
        )
        if isinstance(dataset, ImageDataset):
            return Images(self.root, reader=dataset.reader, input_img_mode=self.mode)
        if hasattr(dataset, "loader"):  # of torchvision, for files
            dataset.loader = partial(read_image, mode=self.mode)
        return dataset

    def prepare_data(self) -> None:
        if self.download:
            for split in self.splits:
                self._create(split, is_training=split == "train")

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:
            return
        for split in self.splits:
            dataset = self._create(split, is_training=split == "train")
            dataset.transform = self._transform(split)
            self._number(dataset, split)
            self.datasets[split] = dataset

    def _number(self, dataset: Any, split: str) -> None:
        """The classes of the training split number those of all."""
        names = class_names_of(dataset)
        if names is None:
            return
        place = f"data.{split}_split={self.splits[split]!r} of {self.dataset_name or self.root!r}"
        if split == "train":
            if len(names) != self.num_classes:
                raise ValueError(
                    f"data.num_classes={self.num_classes}, and {place} has {len(names)} classes: {listed(names)}"
                )
            self.classes = ClassTable(names)
        elif names != self.classes.names:
            self.classes.check(names, where=place)
            missing = [name for name in self.classes.names if name not in names]
            say(f"{place} has no images of {len(missing)} of {len(self.classes)} classes: {listed(missing)}")
            dataset.target_transform = Relabel(self.classes.relabel(names))


class ImageFolder(TransformedImages):
    """Images in folders of classes, or in a table of labels.

    - `root/train/CLASS/*.jpg`, `root/val/CLASS/*.jpg`, and `root/test/CLASS/*.jpg` if there is one; or
    - `root/CLASS/*.jpg`, and `val_fraction` of each class is held out to validate on; or
    - `labels`, a table with the columns `file` (from `root`), `label` and, if wanted, `split`.

    The folder right below a split names the class, however deep its images lie. Classes are numbered by those that have
    images to train on, in natural order (1, 2, 10), and keep their numbers in every split. Hidden files and folders do
    not count. Without images to test on, the test is on those to validate on.

    Args:
        root: the folder; `training`, `validation`, `valid`, `eval`, `testing` are accepted, too, in any case.
        labels: a .csv file; None: `root/labels.csv` if there is one and no folder of a split that holds classes.
        class_names: of the classes by label, to keep the numbers of another run; None: those to train on.
        num_classes: to be sure of; None: as many as there are.
        val_fraction: of each class, above 0 and below 1, where neither a folder nor the table says it.
        split_seed: of that choice, which goes by the names of the files: it stays when others come.
        train_transform, eval_transform, augment: see `TransformedImages`.
        batch_size, img_size, mean, std, balanced, seed, shuffle, num_workers: see `ImageData`.

    Raises:
        ValueError: no root, no images in folders of classes, a split with a class that training does not have, another
            number of classes than `num_classes`, or a table that is none.
        FileNotFoundError: the root, the table, one of its files, or the folder to train on is not there.
    """

    def __init__(
        self,
        *,
        root: str | None,
        batch_size: int,
        labels: str | None = None,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        img_size: int = 224,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        train_transform: Mapping[str, Any] | None = None,
        eval_transform: Mapping[str, Any] | None = None,
        augment: bool = True,
        balanced: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int | None = None,
    ):
        if root is None:
            raise ValueError(
                "data.root is not set: pass data.root=FOLDER, which holds train/CLASS/*.jpg and val/CLASS/*.jpg, or "
                "CLASS/*.jpg"
            )
        if not Path(root).is_dir():
            raise FileNotFoundError(f"data.root={root!r} is not a folder")
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction} must be above 0 and below 1")
        self.root = str(root)
        self.listing = list_images(Path(root), labels=labels, fraction=val_fraction, seed=split_seed)
        given = None if class_names is None else ClassTable(tuple(str(name) for name in class_names))
        classes = self.listing.number(given)
        if len(classes) < 2:
            raise ValueError(
                f"data.root={self.root!r} has images of one class, {classes.names[0]!r}, and there must be two"
            )
        if num_classes not in (None, len(classes)):
            raise ValueError(
                f"data.num_classes={num_classes}, and {self.listing.places['train']} has {len(classes)} classes: "
                f"{listed(classes.names)}"
            )
        super().__init__(
            batch_size=batch_size,
            mean=mean,
            std=std,
            num_classes=len(classes),
            img_size=img_size,
            classes=classes,
            train_transform=train_transform,
            eval_transform=eval_transform,
            augment=augment,
            balanced=balanced,
            seed=seed,
            shuffle=shuffle,
            num_workers=num_workers,
        )

    @property
    def for_record(self) -> dict[str, Any]:
        return recorded(self.class_names)

    @property
    def train_labels(self) -> list[int]:
        return [self.classes.labels[name] for _, name in self.listing.images["train"]]

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:
            return
        for split in SPLITS:
            images = self.listing.images.get(split, self.listing.images["val"])
            labels = self.classes.labels
            samples = [(path, labels[name]) for path, name in images]
            reader = Files(samples, root=self.root, class_to_idx=labels)
            self.datasets[split] = Images(
                self.root, reader=reader, input_img_mode=self.mode, transform=self._transform(split)
            )
