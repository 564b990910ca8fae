"""Batches of videos of one shape each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from .loader import EpochSampler, mix_seed


def nearest_bucket(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> int:
    """Number of the size `(height, width)` whose aspect ratio is nearest, by the ratio of ratios."""
    ratio = math.log(width / height)
    return min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i][1] / sizes[i][0]) - ratio))


class BucketSampler(EpochSampler):
    """As `EpochSampler`, and every batch of all ranks together holds items of one bucket.

    In training a bucket's items that do not fill such a batch are left out of the epoch; in evaluation the last batch
    of each bucket is filled up with items marked as padding.

    Args:
        buckets: the bucket of every item.
        batch_size, shuffle, seed, rank, world: see `EpochSampler`.

    Raises:
        ValueError: in training, no bucket fills a batch. Items of buckets that never do are warned of.
    """

    def __init__(self, buckets: Sequence[int], **options):
        super().__init__(len(buckets), **options)
        self.members = [np.flatnonzero(np.asarray(buckets) == bucket) for bucket in sorted(set(buckets))]
        if not self.shuffle:
            return
        lost = [len(items) for items in self.members if len(items) < self._whole]
        if len(lost) == len(self.members):
            raise ValueError(
                f"data.batch_size={self.batch_size} on {self.world} device(s) needs {self._whole} training videos of "
                f"one size, and the sizes have {', '.join(map(str, lost))}"
            )
        if lost:
            warnings.warn(
                f"{sum(lost)} of {len(buckets)} training videos are never seen: there are fewer than {self._whole} of "
                "their size, too few for a batch",
                stacklevel=2,
            )

    @property
    def _whole(self) -> int:
        return self.batch_size * self.world

    def __len__(self) -> int:
        if self.shuffle:
            return sum(len(items) // self._whole for items in self.members) * self.batch_size
        return sum(-(-len(items) // self._whole) for items in self.members) * self.batch_size

    def _batches(self) -> list[list[tuple[int, bool]]]:
        """Batches of all ranks together: items, and whether they are real."""
        random = np.random.default_rng(mix_seed(self.seed, self.epoch))
        batches = []
        for items in self.members:
            order = random.permutation(items) if self.shuffle else items
            missing = -len(order) % self._whole
            marked = [(int(i), True) for i in order]
            marked = (
                marked[: len(marked) - len(marked) % self._whole]
                if self.shuffle
                else marked + [(int(order[0]), False)] * missing
            )
            batches += [marked[start : start + self._whole] for start in range(0, len(marked), self._whole)]
        if self.shuffle:
            batches = [batches[i] for i in random.permutation(len(batches))]
        return batches

    def __iter__(self) -> Iterator[tuple[int, int | None]]:
        for batch in self._batches()[self.skip_batches :]:
            for index, real in batch[self.rank :: self.world]:
                yield index, self.epoch_of_items if real else None
