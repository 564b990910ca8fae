"""Loading that can stop anywhere: which image comes when, and how it is augmented, follow from the seed alone.

An item is asked for by `(index, epoch)`. Its augmentation draws from generators seeded by (seed, epoch, index), so it
does not depend on the worker that makes it, the number of workers, the number of ranks or what was drawn before. To
resume in the middle of an epoch it is enough to know how many batches were used.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, get_worker_info

PADDING = -1  # target of items that do not count: losses and metrics leave them out


def mix_seed(*parts: int) -> int:
    """One 32-bit seed from several non-negative numbers; neighbouring inputs give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's CPU generators start at `seed` inside and are as they were after.

    Worker processes use their generators for nothing else, so there the way back is saved.
    """
    restore = get_worker_info() is None
    if restore:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if restore:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


class SeededDataset(Dataset):
    """A map-style dataset of `(image, target)` whose random transforms depend on (seed, epoch, index) only.

    Args:
        dataset: items `(image [C, H, W], target)`.
        seed: of the run.
    """

    def __init__(self, dataset: Dataset, *, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)  # pyright: ignore[reportArgumentType]

    def draw(self, key: tuple[int, int | None]) -> Any:
        """The item of `(index, epoch)`; epoch None is that of one that only fills a batch."""
        index, epoch = key
        with seeded(mix_seed(self.seed, epoch or 0, index)):
            return self.dataset[index]

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[Tensor, int]:
        image, target = self.draw(key)
        return image, PADDING if key[1] is None else int(target)


class EpochSampler(Sampler):
    """Yields `(index, epoch)` for one rank: a shuffle that follows from (seed, epoch), dealt out item by item.

    The batches of all ranks together are the batches one process with the whole batch size would see, in the same
    order. Evaluation (`shuffle=False`) covers every item exactly once over all ranks; ranks that run out early get
    items marked as padding by `epoch=None`, so every rank makes the same number of steps. The epoch is always 0 there,
    so that a sample is the same each time, down to its augmentation.

    Args:
        size: items in the dataset.
        batch_size: of one rank; with `shuffle`, items that do not fill a batch on every rank are left out of the epoch.
        shuffle: training order or file order.
        seed: of the run.
        rank, world: which share of how many.
        weights: of the items, `[size]`: with `shuffle`, an epoch draws them with replacement in proportion to these.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world: int = 1,
        weights: np.ndarray | None = None,
    ):
        self.chances = None if weights is None else weights / weights.sum()
        self.size, self.batch_size, self.shuffle, self.seed = size, batch_size, shuffle, seed
        self.rank, self.world = rank, world
        self.epoch, self.skip_batches = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    @property
    def epoch_of_items(self) -> int:
        return self.epoch if self.shuffle else 0

    def __len__(self) -> int:
        if self.shuffle:
            return self.size // (self.batch_size * self.world) * self.batch_size
        return -(-self.size // self.world)

    def __iter__(self) -> Iterator[tuple[int, int | None]]:
        if self.shuffle:
            draw = np.random.default_rng(mix_seed(self.seed, self.epoch))
            if self.chances is None:
                order = draw.permutation(self.size)
            else:
                order = draw.choice(self.size, self.size, p=self.chances)
        else:
            order = np.arange(self.size)
        mine = order[self.rank :: self.world][: len(self)]
        for index in mine[self.skip_batches * self.batch_size :]:
            yield int(index), self.epoch_of_items
        for _ in range(len(self) - len(mine)):
            yield int(order[0]), None


def leave_group(worker: int) -> None:
    """Takes a worker out of the group of processes that Ctrl-C and `timeout` signal as a whole: the training process
    needs it until it has stopped, and then ends it itself."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


class ResumableLoader(DataLoader):
    """A `DataLoader` that Lightning can stop and resume at any batch, through `state_dict` and `load_state_dict`.

    Batches are counted when they are handed out, not when workers fetch them. Nothing is fetched before the first
    batch is asked for, because Lightning tells the sampler its epoch after it called `iter`.

    Args:
        dataset: a `SeededDataset`.
        sampler: the `EpochSampler` of this rank.
        num_workers, pin_memory: as in `DataLoader`.
        receive: what each batch goes through in this process before it is handed out.
        collate: makes a batch of items; None: PyTorch's.
    """

    def __init__(
        self,
        dataset: SeededDataset,
        sampler: EpochSampler,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        receive: Callable[[Any], Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ):
        super().__init__(
            dataset,
            collate_fn=collate,
            batch_sampler=BatchSampler(sampler, sampler.batch_size, drop_last=False),
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=leave_group,
        )
        self.epoch_sampler, self.receive = sampler, receive
        self._handed_out = {"epoch": 0, "batches": 0, "global_batch": sampler.batch_size * sampler.world}
        self._resume: dict[str, int] | None = None

    def __iter__(self):
        epoch, start = self.epoch_sampler.epoch, 0
        if self._resume is not None and self._resume["epoch"] == epoch:
            start = self._resume["batches"]
            wanted, ours = self._resume["global_batch"], self._handed_out["global_batch"]
            if wanted != ours:
                raise ValueError(
                    f"the checkpoint lies inside an epoch of {wanted} images a step (all devices together) and this "
                    f"run takes {ours}: resume with the same data.batch_size x devices, or from the end of an epoch"
                )
        self._resume = None
        self.epoch_sampler.skip_batches = start
        for count, batch in enumerate(super().__iter__(), start + 1):
            self._handed_out.update(epoch=epoch, batches=count)
            yield batch if self.receive is None else self.receive(batch)

    def state_dict(self) -> dict[str, int]:
        """Epoch, how many of its batches were handed out, and the images of one batch over all ranks."""
        return dict(self._handed_out)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """The next iteration of that epoch goes on after those batches; any other epoch starts at its beginning."""
        self._resume = dict(state_dict)
        self._handed_out.update(epoch=state_dict["epoch"], batches=state_dict["batches"])
