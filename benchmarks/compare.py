"""Old rows against new ones: ratios, and which of them are regressions."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .records import Row

ALLOWED = 1.10  # times slower, or more memory, before it may be called a regression
COMPARED = ("time", "memory")  # less is better; other metrics follow from these


class Change(NamedTuple):
    """The same metric of the same subject, measured twice."""

    old: Row
    new: Row

    @property
    def ratio(self) -> float:
        if not self.old.p50:
            return 1.0 if not self.new.p50 else float("inf")
        return self.new.p50 / self.old.p50

    @property
    def is_regression(self) -> bool:
        """Over the allowed ratio, and with bands from the 20th to the 80th percentile that do not touch."""
        low, high = self.new.p20, self.old.p80
        apart = low is None or high is None or low > high
        return self.ratio > ALLOWED and apart

    def __str__(self) -> str:
        new = self.new
        what = f"{new.kernel} {new.case} {new.dtype}, {new.mode}, {new.provider}: {new.metric}"
        return f"{what} {self.old.p50:.4g} -> {new.p50:.4g} {new.unit} ({self.ratio:.2f}x)"


def changes(old: Sequence[Row], new: Sequence[Row]) -> Iterator[Change]:
    """What both hold, in the order of the new rows; devices are not compared."""
    before = {(*row.subject, row.metric): row for row in old}
    for row in new:
        if row.metric in COMPARED and (found := before.get((*row.subject, row.metric))):
            yield Change(found, row)


def regressions(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    return [change for change in changes(old, new) if change.is_regression]
