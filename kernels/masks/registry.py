"""The masks by name, with what the documentation and the tests say of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """One mask.

    Attributes:
        function: makes the mask, from `(query, key, …)` if dynamic, from `(shape, …)` if static.
        paper: arXiv id, or "" where no paper is followed.
        density: argument that sets how much is kept.
        exact: which tokens are kept, as in the paper's formula: "exact", or the approximation in a few words.
        lists: of a mask with keys and values of its own, its `BlockMask` alone, from `(query, key, …)`.
        tokens: of such a mask, what the lists number: keys from keys, values from values, by the same options.
    """

    function: Callable
    paper: str
    density: str
    exact: str = "exact"
    lists: Callable | None = None
    tokens: Callable | None = None

    @property
    def dynamic(self) -> bool:
        return next(iter(signature(self.function).parameters)) == "query"

    @property
    def alone(self) -> bool:
        """Return whether queries and keys or the grid alone make the lists."""
        if self.lists is not None:
            return True
        needed = [p.name for p in signature(self.function).parameters.values() if p.default is p.empty]
        return needed[:3] != ["query", "key", "value"] and "bias" not in needed


REGISTRY: dict[str, Entry] = {}


def published(
    *,
    paper: str,
    density: str,
    exact: str = "exact",
    lists: Callable | None = None,
    tokens: Callable | None = None,
) -> Callable[[F], F]:
    """Register a mask under the name of its function; see `Entry`."""

    def register(function: F) -> F:
        REGISTRY[function.__name__] = Entry(function, paper, density, exact, lists, tokens)
        return function

    return register
