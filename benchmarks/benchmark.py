"""What a benchmark is: cases, the providers of each case, and a picture. The runner owns everything else.

A new benchmark is a class in `benchmarks/suites/` and its place in the registry there.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from .records import Row

Call = Callable[[], object]
Maker = Callable[[], Call]
MODES = ("forward", "forward+backward")


class SkippedError(Exception):
    """A provider does not run a case; the text says why."""


class WrongResultError(Exception):
    """Ours breaks the error rule; the text says where."""


def refuse_wrong(what: str, found: Mapping[str, tuple[float, float]]) -> None:
    """Raise WrongResultError unless each error is within what is allowed; both by the name of a result."""
    for name, (error, allowed) in found.items():
        if not error <= allowed:
            result = name if name == "out" else f"the gradient of {name}"
            raise WrongResultError(
                f"{what}: {result} is off by {error:.2g} where {allowed:.2g} is allowed; no numbers from wrong results"
            )


class Work(NamedTuple):
    """Useful FLOPs and compulsory bytes of a call."""

    flops: int
    bytes: int


class Metric(NamedTuple):
    """One metric of one provider: median and, where it was repeated, the 20th and 80th percentile."""

    provider: str
    metric: str
    unit: str
    p50: float
    p20: float | None = None
    p80: float | None = None


class Case(Protocol):
    """What is measured: `kernel`, `name` and `dtype` identify it in the CSV, `source` says whose shapes these are."""

    @property
    def kernel(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def source(self) -> str: ...


def dtype_name(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


class Benchmark(ABC):
    """Attributes:
    name: of its CSV and picture.
    suite: what `run --suite` calls it by.
    title: what it compares, for people.
    our_names: providers that are this project's.
    rivals: one of ours and what it is compared with; empty where that is the fastest other.
    """

    name: ClassVar[str]
    suite: ClassVar[str]
    title: ClassVar[str]
    our_names: ClassVar[tuple[str, ...]] = ("foveal", "foveal compiled")
    rivals: ClassVar[tuple[tuple[str, str], ...]] = ()
    modes: ClassVar[tuple[str, ...]] = MODES

    @abstractmethod
    def cases(self, device: torch.device, *, everything: bool = False) -> Iterable[Any]:
        """Cases that this device can run; with `everything` also those that its default leaves out."""

    @abstractmethod
    def makers(self, case: Any, mode: str, device: torch.device, *, everything: bool = False) -> dict[str, Maker]:
        """By the name of a provider, what makes its call; made only when its turn comes, and called once first."""

    def verify(self, case: Any, device: torch.device) -> None:  # noqa: B027  whole models have tests of their own
        """Raise WrongResultError unless ours is right on this case."""

    def same_result(self, provider: str) -> bool:
        """Whether the provider computes what ours does, so that its results must agree."""
        return False

    def work(self, case: Any, mode: str) -> Work | None:
        """What the call must compute and move, where a cost model says."""
        return None

    def derive(self, case: Any, mode: str, measured: Sequence[Metric], device: torch.device) -> Iterator[Metric]:
        """Metrics that follow from those of one case and mode."""
        yield from ()

    def conclude(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Rows that follow from those of all cases."""
        yield from ()

    @abstractmethod
    def plot(self, rows: Sequence[Row], path: Path) -> None:
        """Draw the rows, all of one device."""
