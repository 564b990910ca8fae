"""Images that cannot be read: they are neither replaced nor counted, and the run says which they were.

The reading process cannot leave an item out, so it hands in a blank one whose target tells its place in the dataset.
The training process takes note of the file and lets the item go.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .loader import PADDING, SeededDataset, mix_seed, seeded
from .names import say
from .pixels import UnreadableImage

SAID = 5  # files of a split that are named as they turn up
AT_FIRST, IN_A_ROW = 100, 1000  # images to train on of which none can be read: more are not tried


class SeededImages(SeededDataset):
    """As `SeededDataset`; an image that cannot be read is blank, and its target `PADDING - 1 - index`.

    Args:
        dataset: raises `UnreadableImage` for it.
        seed: of the run.
        shape: `(C, H, W)` of the images.
    """

    def __init__(self, dataset: Dataset, *, seed: int, shape: tuple[int, int, int]):
        super().__init__(dataset, seed=seed)
        self.shape = shape

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[Tensor, int]:
        try:
            return super().__getitem__(key)
        except UnreadableImage:
            index, epoch = key
            return torch.zeros(self.shape), PADDING if epoch is None else PADDING - 1 - index


class Receiver:
    """Takes the images that could not be read out of `[images, targets]`.

    To train on, a batch is that much smaller, down to nothing. Otherwise they stay with the target `PADDING`.

    Args:
        dataset: that the batches come from.
        split: "train", "val" or "test".
        size: items of one pass, of this rank.
        world: ranks.
        reasons: why a file cannot be read, by path; grows.

    Raises:
        ValueError: none can be read, to begin with or for long; the message names the first.
    """

    def __init__(self, dataset: Dataset, *, split: str, size: int, world: int, reasons: dict[str, str]):
        self.dataset, self.split, self.size, self.world, self.reasons = dataset, split, size, world, reasons
        self.known: set[int] = set()
        self.any_read = False
        self.in_a_row = 0

    def __call__(self, batch: list[Tensor]) -> list[Tensor]:
        images, targets = batch
        broken = targets < PADDING
        places = broken.nonzero().flatten().tolist()
        read = (targets > PADDING).nonzero().flatten().tolist()
        if read:
            self.any_read, self.in_a_row = True, sum(place > read[-1] for place in places)
        else:
            self.in_a_row += len(places)
        if not places:
            return batch
        for index in (PADDING - 1 - targets[broken]).tolist():
            self._note(index)
        if self.in_a_row >= self._limit():
            path, reason = next(iter(self.reasons.items()))
            raise ValueError(
                f"none of {self.in_a_row} {self.split} images in a row can be read; the first is {path}: {reason}"
            )
        if self.split == "train":
            return [images[~broken], targets[~broken]]
        return [images, targets.masked_fill(broken, PADDING)]

    def _limit(self) -> int:
        """Images in a row without a readable one that end the run: all of a split, or so many that it makes no sense.

        With one that was read, a pass may end and the next begin with less than a pass of others.
        """
        most = 2 * self.size if self.any_read else self.size
        if self.split == "train":
            return min(most, IN_A_ROW if self.any_read else AT_FIRST)
        return most if self.world == 1 else max(most, AT_FIRST)  # other ranks may have the readable ones of a few

    def _note(self, index: int) -> None:
        if index in self.known:
            return
        self.known.add(index)
        with seeded(mix_seed(index)):
            try:
                self.dataset[index]
                name, reason = f"image {index}", "it could be read when it was tried again"
            except UnreadableImage as error:
                name, reason = error.name, error.reason
        if name not in self.reasons:
            self.reasons[name] = reason
            if len(self.reasons) <= SAID:
                more = "; further ones are only listed" if len(self.reasons) == SAID else ""
                say(f"an image of {self.split} cannot be read and does not count: {name}: {reason}{more}")
