"""Definition of a benchmark: cases, providers of each case, and a picture. The runner does the rest.

A new benchmark is a class in `benchmarks/suites/` and an entry of the registry there.
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
    """Raised when a provider does not run a case; the text gives the reason."""


class WrongResultError(Exception):
    """Raised when a result of this project breaks the error rule; the text says which."""


def refuse_wrong(what: str, found: Mapping[str, tuple[float, float]]) -> None:
    """Raise WrongResultError unless each error is at most the allowed one; both are keyed by the name of a result."""
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
    """Measured case. `kernel`, `name` and `dtype` identify it in the CSV; `source` names the model of its shapes."""

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
        """Functions that make the call of each provider, when its turn comes; it runs once before it is timed."""

    def verify(self, case: Any, device: torch.device) -> None:  # noqa: B027  whole models have tests of their own
        """Raise WrongResultError unless the result of this project is right on the case."""

    def same_result(self, provider: str) -> bool:
        """Return whether a provider computes the same function, so that its results must agree."""
        return False

    def work(self, case: Any, mode: str) -> Work | None:
        """Useful FLOPs and compulsory bytes of the call, or None without a cost model."""
        return None

    def derive(self, case: Any, mode: str, measured: Sequence[Metric], device: torch.device) -> Iterator[Metric]:
        """Derive metrics from those of one case and mode."""
        yield from ()

    def conclude(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Derive rows from those of all cases."""
        yield from ()

    @abstractmethod
    def plot(self, rows: Sequence[Row], path: Path) -> None:
        """Draw the rows, all of one device."""
