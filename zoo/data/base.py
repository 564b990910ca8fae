"""What data modules share: three datasets, seeded loaders over them, and the numbers a task needs to know."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .loader import EpochSampler, ResumableLoader, SeededDataset, leave_group


class SeededData(LightningDataModule):
    """Loaders whose order and augmentation follow from the seed and that resume inside an epoch.

    A subclass sets `self.datasets` in `setup`: a dict with "train", "val" and "test".

    Args:
        batch_size: items of one step on one device.
        seed: order and augmentation follow from it.
        shuffle: new order in every epoch; off, training is in file order and with the same augmentation every time (to
            overfit a few samples on purpose).
        num_workers: processes that load; 0 loads in the training process.
    """

    item = "images"  # what messages call the items
    seeded_dataset = SeededDataset

    def __init__(self, *, batch_size: int, seed: int = 0, shuffle: bool = True, num_workers: int = 0):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size} must be at least 1")
        self.batch_size, self.num_workers, self.seed, self.shuffle = batch_size, num_workers, seed, shuffle
        self.datasets: dict[str, Dataset] = {}
        self._train_loader: DataLoader | None = None
        self._resume: dict[str, int] = {}

    @property
    def for_task(self) -> dict[str, Any]:
        """Arguments of the task that only the data knows."""
        raise NotImplementedError

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
        dataset = self.seeded_dataset(dataset, seed=self.seed)
        return ResumableLoader(dataset, sampler, num_workers=self.num_workers, pin_memory=pin_memory)

    def train_dataloader(self) -> DataLoader:
        self._train_loader = self._loader("train", shuffle=self.shuffle)
        self._seek()
        return self._train_loader

    def state_dict(self) -> dict[str, int]:
        """Where training is in its data; Lightning loses its loaders' states when a scheduler asks for the length."""
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
    """Images `[B, C, H, W]` (float, normalised) with targets `[B]` (int64).

    Args:
        mean, std: one value per channel, in units of pixel/255, that the transforms normalise with.
        num_classes: classes of the targets.
        batch_size, seed, shuffle, num_workers: see `SeededData`.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        num_classes: int,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
    ):
        super().__init__(batch_size=batch_size, seed=seed, shuffle=shuffle, num_workers=num_workers)
        self.mean, self.std, self.num_classes = tuple(mean), tuple(std), num_classes
        self.class_names = [str(i) for i in range(num_classes)]

    @property
    def for_task(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes, "in_chans": len(self.mean)}

    def denormalize(self, images: Tensor) -> Tensor:
        """`[B, C, H, W]` as the model gets them → pixels in 0..1."""
        mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (images.float() * std + mean).clamp(0, 1)
