"""Bags of instances with one label each: folders of images, files of features, and bags of handwritten digits."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils import natural_key
from torch import Tensor
from torch.utils.data import Dataset

from .augment import make_transform
from .base import SeededData, to_pixels
from .classes import ClassTable, recorded
from .digits import split_digits
from .folders import SPLITS, Listing, folder_of, hold_out, is_image
from .foreign import reason
from .loader import PADDING, SeededDataset, mix_seed
from .names import say
from .pixels import UnreadableImage, mode_of, read_image
from .spec import DataSpec

FEATURES = (".npy", ".npz", ".pt", ".safetensors", ".h5")
Bag = tuple[Tensor, int, Tensor | None]  # instances [n, …], label, marks of instances [n]


class SeededBags(SeededDataset):
    """Bags whose random draws depend on (seed, epoch, index) only; the label is PADDING in one that fills a batch."""

    def __getitem__(self, key: tuple[int, int | None]) -> Any:
        instances, label, marks = self.draw(key)
        return instances, PADDING if key[1] is None else label, marks


def pad_bags(bags: Sequence[Bag]) -> tuple[Tensor, ...]:
    """A batch of bags, padded with zeros to the longest.

    Returns:
        instances `[B, N, …]`, labels `[B]`, mask of instances that are there, bool `[B, N]`, and where the bags have
        them, marks of instances, bool `[B, N]`.
    """
    longest = max(len(instances) for instances, _, _ in bags)
    first, _, marked = bags[0]
    padded = first.new_zeros(len(bags), longest, *first.shape[1:])
    mask, marks = torch.zeros(len(bags), longest, dtype=torch.bool), torch.zeros(len(bags), longest, dtype=torch.bool)
    for row, (instances, _, some) in enumerate(bags):
        padded[row, : len(instances)] = instances
        mask[row, : len(instances)] = True
        if some is not None:
            marks[row, : len(some)] = some
    labels = torch.tensor([label for _, label, _ in bags])
    return (padded, labels, mask) if marked is None else (padded, labels, mask, marks)


class BagData(SeededData):
    """Bags as `pad_bags` makes batches of them.

    Args:
        classes: names of the labels.
        instance: shape of an instance, `[C, H, W]` of images or `[dim]` of features.
        batch_size, seed, shuffle, num_workers: see `SeededData`; a batch is of bags.
    """

    item = "bags"
    marked = False  # bags tell which of their instances make the label
    seeded_dataset = SeededBags
    collate = staticmethod(pad_bags)

    def __init__(self, *, classes: ClassTable, instance: tuple[int, ...], **options: Any):
        super().__init__(**options)
        self.classes, self.instance, self.num_classes = classes, tuple(instance), len(classes)

    @property
    def class_names(self) -> list[str]:
        """By label."""
        return list(self.classes.names)

    @property
    def train_labels(self) -> list[int]:
        """Labels of the training bags in their order."""
        raise NotImplementedError

    @property
    def class_counts(self) -> list[int]:
        """Training bags of each class."""
        return np.bincount(self.train_labels, minlength=self.num_classes).tolist()

    @property
    def spec(self) -> DataSpec:
        return DataSpec(self.instance[0], self.instance[1:], self.num_classes, self.classes.names)

    @property
    def for_task(self) -> dict[str, Any]:
        facts = {"num_classes": self.num_classes, "class_names": self.class_names, "marked": self.marked}
        return facts | {"instance": list(self.instance)}

    def denormalize(self, images: Tensor) -> Tensor:
        """Instances `[N, C, H, W]` → pixels in 0..1."""
        return images.float().clamp(0, 1)


class BagsOfDigits(Dataset):
    """Bag `i` is positive where `i` is odd, and always the same."""

    def __init__(self, scans: Tensor, labels: Tensor, *, length: int, size: int, digit: int, most: int, place: int):
        self.scans, self.length, self.size, self.most, self.place = scans, length, size, most, place
        self.wanted, self.others = ((labels == digit).nonzero()[:, 0], (labels != digit).nonzero()[:, 0])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Bag:
        draw = np.random.default_rng(mix_seed(self.place, index))
        count = int(draw.integers(1, self.most + 1)) if index % 2 else 0
        wanted = self.wanted[torch.from_numpy(draw.permutation(len(self.wanted))[:count])]
        others = self.others[torch.from_numpy(draw.permutation(len(self.others))[: self.size - count])]
        order = torch.from_numpy(draw.permutation(self.size))
        marks = (torch.arange(self.size) < count)[order]
        return self.scans[torch.cat([wanted, others])[order]], index % 2, marks


class DigitBags(BagData):
    """Bags of scikit-learn's scans, positive where one or a few show a certain digit; their parts share no scan.

    Args:
        bag: scans of a bag.
        digit: that makes a bag positive.
        most: scans of it in a positive bag, one at least.
        train_length, val_length, test_length: bags of a split, half of them positive.
        batch_size, seed, shuffle, num_workers: see `BagData`.

    Raises:
        ValueError: numbers that are out of range.
    """

    marked = True

    def __init__(
        self,
        *,
        batch_size: int = 8,
        bag: int = 20,
        digit: int = 9,
        most: int = 2,
        train_length: int = 100,
        val_length: int = 100,
        test_length: int = 200,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int | None = 0,
    ):
        if not (0 <= digit <= 9 and 1 <= most <= min(bag, 10) and bag <= 100):
            raise ValueError(
                f"data.digit={digit} must be 0 to 9, data.most={most} 1 to data.bag={bag} and at most 10, data.bag at "
                "most 100"
            )
        self.lengths = {"train": train_length, "val": val_length, "test": test_length}
        for split, length in self.lengths.items():
            if length < 2:
                raise ValueError(f"data.{split}_length={length} must be at least 2, a bag of each label")
        names = ClassTable((f"no {digit}", f"a {digit}"))
        options = {"seed": seed, "shuffle": shuffle, "num_workers": num_workers}
        super().__init__(classes=names, instance=(1, 8, 8), batch_size=batch_size, **options)
        self.options = {"size": bag, "digit": digit, "most": most}

    @property
    def train_labels(self) -> list[int]:
        return [i % 2 for i in range(self.lengths["train"])]

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:
            return
        from sklearn.datasets import load_digits

        scans = torch.from_numpy(load_digits().images / 16).float()[:, None]
        for place, (split, (numbers, labels)) in enumerate(split_digits().items()):
            self.datasets[split] = BagsOfDigits(
                scans[numbers], torch.tensor(labels), length=self.lengths[split], place=place, **self.options
            )


def read_features(path: str, *, key: str = "features") -> Tensor:
    """Features of the instances of a bag, float32 `[n, dim]`.

    Args:
        path: a `.npy`, a `.pt` with a tensor or a dict of tensors, or an `.npz`, `.safetensors` or `.h5`.
        key: of the features in files that hold several things.

    Raises:
        ValueError: there is no matrix of numbers of one row or more.
        ImportError: an `.h5`, and h5py is not installed.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".h5" and find_spec("h5py") is None:
        raise ImportError(
            f"{path} is read by the package h5py, which is not installed: pip install h5py, or store the features as "
            f"{', '.join(FEATURES[:-1])}"
        )
    try:
        if suffix in (".npy", ".npz"):
            found: Any = np.load(path)
            if suffix == ".npz":
                with found:
                    found = found[key]
        elif suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found = file.get_tensor(key)
        elif suffix == ".pt":
            found = torch.load(path, map_location="cpu", weights_only=True)
            found = found[key] if isinstance(found, Mapping) else found
        else:
            import h5py  # pyright: ignore[reportMissingImports]

            with h5py.File(path, "r") as file:
                found = np.asarray(file[key])
        features = torch.as_tensor(found).float()
    except MemoryError:
        raise
    except Exception as error:  # readers raise what their formats have
        raise ValueError(f"{path} has no features that can be read (data.key={key!r}): {reason(error)}") from error
    features = features[0] if features.dim() == 3 and len(features) == 1 else features  # as some tools store them
    if features.dim() != 2 or not features.numel():
        raise ValueError(f"{path} has features of shape {list(features.shape)}; expected [instances, channels]")
    return features


def images_of(folder: str) -> list[str]:
    """Images of a bag in natural order, however deep they lie; nothing hidden."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(place, name) for name in files if is_image(name) and not name.startswith(".")]
    return sorted(found, key=lambda path: (natural_key(path), path))


def list_bags(root: Path, *, fraction: float, seed: int) -> Listing:
    """`root/train/CLASS/BAG` with `val` and `test` beside `train`, or `root/CLASS/BAG`; a bag is a folder or a file.

    Args:
        root: the folder.
        fraction: of each class to validate on where there is no folder for it.
        seed: of that choice, which goes by the names of the bags.

    Raises:
        ValueError: there are no bags, or a class has only one and none to validate on.
        FileNotFoundError: there is a split, but none for training.
    """
    folders = {split: folder for split in SPLITS if (folder := folder_of(root, split))}
    if folders and "train" not in folders:
        raise FileNotFoundError(f"data.root={str(root)!r} has no folder for the split 'train'")
    places = folders or {"train": root}
    bags: dict[str, list[tuple[str, str]]] = {}
    for split, folder in places.items():
        found = [
            (str(path), kind.name) for kind in sorted(folder.iterdir()) if kind.is_dir() for path in kind.iterdir()
        ]
        found = [(path, kind) for path, kind in found if not Path(path).name.startswith(".")]
        kept = [(path, kind) for path, kind in found if path.lower().endswith(FEATURES) or os.path.isdir(path)]
        if not kept:
            expected = f"CLASS/BAG/*.jpg or CLASS/BAG{', '.join(FEATURES)}"
            raise ValueError(f"data.root={str(root)!r}: {folder} holds no bags; expected {expected}")
        bags[split] = sorted(kept, key=lambda bag: (natural_key(bag[0]), bag[0]))
    if "val" not in bags:
        bags["train"], bags["val"] = hold_out(bags["train"], root=root, fraction=fraction, seed=seed)
        places = places | {"val": places["train"]}
        say(f"{len(bags['val'])} of the bags of {places['train']} are held out to validate on")
    if not bags["val"]:
        raise ValueError(
            f"{places['train']} leaves nothing to validate on: a class needs two bags, or pass a folder val"
        )
    return Listing(bags, {split: str(place) for split, place in places.items()})


class BagFiles(Dataset):
    """Bags of listed folders and files; an image that cannot be read is left out.

    Args:
        samples: path and label of each.
        key: see `read_features`.
        transform: from an image to `[C, size, size]`.
        mode: "RGB" or "L".
        instances: at most so many of a bag, drawn at random; None: all.
        width: channels of features.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        *,
        key: str,
        width: int,
        transform: Callable[[Any], Tensor],
        mode: Any,
        instances: int | None,
    ):
        self.samples, self.key, self.transform, self.mode = list(samples), key, transform, mode
        self.instances, self.width = instances, width

    def __len__(self) -> int:
        return len(self.samples)

    def _some(self, count: int) -> list[int]:
        """Places of the instances to take, in their order."""
        if self.instances is None or count <= self.instances:
            return list(range(count))
        return torch.randperm(count)[: self.instances].sort().values.tolist()

    def __getitem__(self, index: int) -> Bag:
        """Instances, label and no marks.

        Raises:
            ValueError: nothing of the bag can be read, or its features have another width.
        """
        path, label = self.samples[index]
        if os.path.isfile(path):
            features = read_features(path, key=self.key)
            if features.shape[1] != self.width:
                raise ValueError(f"{path} has features of {features.shape[1]} channels, and others have {self.width}")
            return features[self._some(len(features))], label, None
        files, read, why = images_of(path), [], "it holds no images"
        for place in self._some(len(files)):
            try:
                read.append(self.transform(read_image(files[place], self.mode)))
            except UnreadableImage as error:
                why = str(error)
        if not read:
            raise ValueError(f"nothing of the bag {path} can be read: {why}")
        return torch.stack(read), label, None


class BagFolder(BagData):
    """Bags in folders of classes: `root/train/CLASS/BAG`, with `val` and `test` if there are, or `root/CLASS/BAG`.

    A bag is a folder of images, or a file with a feature for each instance: `.npy`, `.npz`, `.pt`, `.safetensors`, or
    `.h5` where h5py is installed. All bags are of one kind. Classes are numbered by those of the training bags, in
    natural order.

    Args:
        root: the folder.
        class_names: of the classes by label; None: those to train on.
        key: of the features in files that hold several things.
        instances: at most so many of a training bag, drawn anew in each epoch; None: all. Evaluation takes all.
        img_size, mean, std, train_transform, eval_transform, augment: of images, as in `ImageFolder`.
        val_fraction, split_seed: as in `ImageFolder`, by bags.
        batch_size, seed, shuffle, num_workers: see `BagData`.

    Raises:
        ValueError: no root, no bags, bags of two kinds or widths, one class only.
        FileNotFoundError: the root or the folder to train on is not there.
    """

    def __init__(
        self,
        *,
        root: str | None,
        batch_size: int = 1,
        class_names: Sequence[str] | None = None,
        key: str = "features",
        instances: int | None = None,
        img_size: int = 224,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        train_transform: Mapping[str, Any] | None = None,
        eval_transform: Mapping[str, Any] | None = None,
        augment: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int | None = None,
    ):
        if root is None:
            raise ValueError("data.root is not set: pass data.root=FOLDER, which holds train/CLASS/BAG or CLASS/BAG")
        if not Path(root).is_dir():
            raise FileNotFoundError(f"data.root={root!r} is not a folder")
        if not 0 < val_fraction < 1 or (instances is not None and instances < 1):
            raise ValueError(
                f"data.val_fraction={val_fraction} must be above 0 and below 1, data.instances={instances} at least 1"
            )
        self.listing = list_bags(Path(root), fraction=val_fraction, seed=split_seed)
        classes = self.listing.number(None if class_names is None else ClassTable(tuple(map(str, class_names))))
        if len(classes) < 2:
            raise ValueError(f"data.root={root!r} has bags of one class, {classes.names[0]!r}, and there must be two")
        every = [path for split in self.listing.images.values() for path, _ in split]
        files = [path for path in every if os.path.isfile(path)]
        if len(files) not in (0, len(every)):
            other = next(path for path in every if path not in set(files))
            raise ValueError(
                f"data.root={root!r} has bags of two kinds, files such as {files[0]} and folders as {other}"
            )
        self.mean, self.std, self.mode = tuple(mean), tuple(std), mode_of(tuple(mean))
        self.key, self.instances = key, instances
        shape = tuple(read_features(files[0], key=key).shape[1:]) if files else (len(mean), img_size, img_size)
        options = {"seed": seed, "shuffle": shuffle, "num_workers": num_workers}
        super().__init__(classes=classes, instance=shape, batch_size=batch_size, **options)
        facts: dict[str, Any] = {"size": img_size, "mean": self.mean, "std": self.std, "mode": self.mode}
        plain = make_transform(eval_transform or {}, is_training=False, **facts)
        other = make_transform(train_transform or {}, is_training=True, **facts) if augment else plain
        self.transforms = {"train": other, "val": plain, "test": plain}

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
            bags = self.listing.images.get(split, self.listing.images["val"])
            samples = [(path, self.classes.labels[name]) for path, name in bags]
            instances = self.instances if split == "train" else None
            options = {"key": self.key, "mode": self.mode, "instances": instances, "width": self.instance[0]}
            self.datasets[split] = BagFiles(samples, transform=self.transforms[split], **options)

    def denormalize(self, images: Tensor) -> Tensor:
        """Instances `[N, C, H, W]` as the model gets them → pixels in 0..1."""
        return to_pixels(images, self.mean, self.std)
