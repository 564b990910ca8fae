"""Base of data modules: three datasets, seeded loaders over them, and the facts that a task needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .classes import ClassTable
from .loader import EpochSampler, ResumableLoader, SeededDataset, leave_group
from .pixels import mode_of
from .spec import DataSpec
from .unreadable import Receiver, SeededImages

MOST_WORKERS = 8


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class SeededData(LightningDataModule):
    """Loaders whose order and augmentation follow from the seed and that resume inside an epoch.

    A subclass sets `self.datasets` in `setup`: a dict with "train", "val" and "test".

    Args:
        batch_size: items of one step on one device.
        seed: order and augmentation follow from it.
        shuffle: new order in every epoch; off, training is in file order and with the same augmentation every time (to
            overfit a few samples on purpose).
        num_workers: processes that load; 0 loads in the training process; None: one per core, at most eight.
    """

    item = "images"  # what messages call the items
    seeded_dataset = SeededDataset
    collate: Callable[[list[Any]], Any] | None = None  # makes a batch of items; None: PyTorch's

    def __init__(self, *, batch_size: int, seed: int = 0, shuffle: bool = True, num_workers: int | None = 0):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size} must be at least 1")
        if num_workers is None:
            num_workers = min(MOST_WORKERS, available_cores())
        if num_workers < 0:
            raise ValueError(f"data.num_workers={num_workers} must be at least 0, or null for one per core")
        self.batch_size, self.num_workers, self.seed, self.shuffle = batch_size, num_workers, seed, shuffle
        self.datasets: dict[str, Dataset] = {}
        self._train_loader: DataLoader | None = None
        self._resume: dict[str, int] = {}

    @property
    def spec(self) -> DataSpec:
        """Facts about the items, for tasks, reports and exports."""
        raise NotImplementedError

    @property
    def for_task(self) -> dict[str, Any]:
        """Arguments of the task that follow from `spec`."""
        raise NotImplementedError

    @property
    def for_record(self) -> dict[str, Any]:
        """Keys of the configuration that only the data could fill in, for the run's record."""
        return {}

    def _sampler(self, split: str, **options: Any) -> EpochSampler:
        return EpochSampler(len(self.datasets[split]), **options)  # pyright: ignore[reportArgumentType]

    def _loader(self, split: str, *, shuffle: bool) -> DataLoader:
        dataset = self.datasets[split]
        pin_memory = torch.cuda.is_available()
        if isinstance(dataset, IterableDataset):
            options = {"num_workers": self.num_workers, "pin_memory": pin_memory, "worker_init_fn": leave_group}
            loader = DataLoader(dataset, self.batch_size, **options)
            # streams shuffle by themselves: Lightning tells the epoch to samplers only, so theirs passes it on
            setattr(loader.sampler, "set_epoch", getattr(dataset, "set_epoch", None))  # noqa: B010
            return loader
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        size = len(dataset)  # pyright: ignore[reportArgumentType]
        if shuffle and size < self.batch_size * world:
            raise ValueError(
                f"data.batch_size={self.batch_size} on {world} device(s) needs {self.batch_size * world} training "
                f"{self.item}, and there are {size}"
            )
        sampler = self._sampler(
            split, batch_size=self.batch_size, shuffle=shuffle, seed=self.seed, rank=rank, world=world
        )
        return ResumableLoader(
            self._seeded(dataset),
            sampler,
            num_workers=self.num_workers,
            pin_memory=pin_memory,
            receive=self._receiver(split, sampler),
            collate=self.collate,
        )

    def _seeded(self, dataset: Dataset) -> SeededDataset:
        return self.seeded_dataset(dataset, seed=self.seed)

    def _receiver(self, split: str, sampler: EpochSampler) -> Callable[[Any], Any] | None:
        """Function applied to each batch that leaves the loader, or None."""
        return None

    def train_dataloader(self) -> DataLoader:
        self._train_loader = self._loader("train", shuffle=self.shuffle)
        self._seek()
        return self._train_loader

    def state_dict(self) -> dict[str, int]:
        """Position of training in its data: Lightning loses loader states when a scheduler asks for the length."""
        return self._train_loader.state_dict() if isinstance(self._train_loader, ResumableLoader) else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._resume = dict(state_dict)
        self._seek()

    def _seek(self) -> None:
        if self._resume and isinstance(self._train_loader, ResumableLoader):
            self._train_loader.load_state_dict(self._resume)
            self._resume = {}

    def val_dataloader(self) -> DataLoader:
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader:
        return self._loader("test", shuffle=False)


class ImageData(SeededData):
    """Images `[B, C, H, W]` (float, normalised) with targets `[B]` (int64) or, of a table, `[B, T]` (float32).

    An image that cannot be read does not count. A batch to evaluate has `PADDING` as its target, a batch to train on is
    that much smaller; the file and the reason go to `unreadable`. Order and augmentation of the others stay.

    Args:
        mean, std: one value per channel, in units of pixel/255, that the transforms normalise with.
        num_classes: classes of the targets.
        img_size: pixels a side that the model gets.
        classes: their names; None: their numbers.
        balanced: draw training images so that every class comes as often as the others: with replacement, in each
            epoch as many as there are.
        batch_size, seed, shuffle, num_workers: see `SeededData`.

    Attributes:
        unreadable: reasons by path, by split; of this process.
    """

    fewest_classes = 2

    def __init__(
        self,
        *,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        num_classes: int,
        img_size: int,
        classes: ClassTable | None = None,
        balanced: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int | None = 0,
    ):
        super().__init__(batch_size=batch_size, seed=seed, shuffle=shuffle, num_workers=num_workers)
        self.mean, self.std, self.num_classes, self.img_size = tuple(mean), tuple(std), num_classes, img_size
        self.mode = mode_of(self.mean)
        if len(self.std) != len(self.mean) or min(self.std) <= 0:
            raise ValueError(
                f"data.std={list(std)} must have as many values as data.mean={list(mean)}, each above zero"
            )
        if num_classes < self.fewest_classes:
            raise ValueError(f"data.num_classes={num_classes} must be at least {self.fewest_classes}")
        if not isinstance(img_size, int) or img_size < 1:
            raise ValueError(f"data.img_size={img_size!r} must be a number of pixels, at least 1")
        self.classes = classes or ClassTable(tuple(str(i) for i in range(num_classes)))
        self.unreadable: dict[str, dict[str, str]] = {}
        self.balanced = balanced

    @property
    def class_names(self) -> list[str]:
        """By label."""
        return list(self.classes.names)

    @property
    def train_labels(self) -> list[int] | None:
        """Labels of the training images in their order; None: they are not known before images are read."""
        return None

    @property
    def class_counts(self) -> list[int] | None:
        """Training images of each class; None: they are not known."""
        labels = self.train_labels
        return None if labels is None else np.bincount(labels, minlength=self.num_classes).tolist()

    def _sampler(self, split: str, **options: Any) -> EpochSampler:
        weights = None
        if self.balanced and options["shuffle"]:
            labels = self.train_labels
            if labels is None:
                raise ValueError("data.balanced=true: these data do not know how many images a class has")
            weights = 1.0 / np.bincount(labels, minlength=self.num_classes)[labels]
        return super()._sampler(split, weights=weights, **options)

    @property
    def spec(self) -> DataSpec:
        size, names = (self.img_size, self.img_size), self.classes.names
        return DataSpec(len(self.mean), size, self.num_classes, names, mean=self.mean, std=self.std)

    @property
    def for_task(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "num_classes": spec.num_classes,
            "in_chans": spec.channels,
            "img_size": spec.size[-1],
            "class_names": list(spec.class_names),
        }

    def _seeded(self, dataset: Dataset) -> SeededDataset:
        return SeededImages(dataset, seed=self.seed, shape=(len(self.mean), self.img_size, self.img_size))

    def _receiver(self, split: str, sampler: EpochSampler) -> Callable[[Any], Any]:
        return Receiver(
            self.datasets[split],
            split=split,
            size=len(sampler),
            world=sampler.world,
            reasons=self.unreadable.setdefault(split, {}),
        )

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Input size, mean and std of the images that are evaluated, named as in timm's `pretrained_cfg`."""
        spec = self.spec
        return {"input_size": (spec.channels, *spec.size), "mean": spec.mean, "std": spec.std}

    def denormalize(self, images: Tensor) -> Tensor:
        """`[B, C, H, W]` as the model gets them → pixels in 0..1."""
        return to_pixels(images, self.spec.mean, self.spec.std)


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalized images `[…, C, H, W]` → pixels in 0..1, by a mean and a deviation of each channel."""
    means, stds = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return (images.float() * stds + means).clamp(0, 1)
