"""Compare old and new rows: ratios and regressions."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .records import Row

ALLOWED = 1.10  # ratio of time or memory from which a change can be a regression
COMPARED = ("time", "memory")  # lower is better; other metrics derive from these


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
        """Return whether a change exceeds the allowed ratio and its bands (20th to 80th percentile) do not overlap."""
        low, high = self.new.p20, self.old.p80
        apart = low is None or high is None or low > high
        return self.ratio > ALLOWED and apart

    def __str__(self) -> str:
        new = self.new
        what = f"{new.kernel} {new.case} {new.dtype}, {new.mode}, {new.provider}: {new.metric}"
        return f"{what} {self.old.p50:.4g} -> {new.p50:.4g} {new.unit} ({self.ratio:.2f}x)"


def changes(old: Sequence[Row], new: Sequence[Row]) -> Iterator[Change]:
    """Changes of the subjects in both files, in the order of the new rows; devices are ignored."""
    before = {(*row.subject, row.metric): row for row in old}
    for row in new:
        if row.metric in COMPARED and (found := before.get((*row.subject, row.metric))):
            yield Change(found, row)


def regressions(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    return [change for change in changes(old, new) if change.is_regression]
