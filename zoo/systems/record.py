"""One published system: its source, its place in the library, how far the implementation goes, and its test."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

STATUS = ("exact", "partial", "idea")
PACKAGE = __name__.rpartition(".zoo.")[0]  # name of the library


@dataclass(frozen=True)
class System:
    """A paper, or a system without one, that the library implements.

    Attributes:
        name: of the system.
        source: arXiv ids, repositories as "owner/name", or venue and year, separated by commas.
        where: its objects, "module:attribute" or "module" below the package, separated by commas.
        test: "file::text": a file below `tests/` and a text in it, such as the name of a test, that names the system.
        status: "exact" (recorded outputs of the official code, or the paper's formula), "partial" (something is left
            out), "idea" (the formula is not public; ours follows the text).
        note: what the status leaves open.
        shown: code by which a user reaches it; the attributes of `where` when empty.

    Raises:
        ValueError: an unknown status, a status other than "exact" without a note, or a test without a text.
    """

    name: str
    source: str
    where: str
    test: str
    status: str = "exact"
    note: str = ""
    shown: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUS or (self.status != "exact" and not self.note):
            raise ValueError(f"system {self.name!r} has status={self.status!r} of {STATUS} and note={self.note!r}")
        if not all(self.test.partition("::")):
            raise ValueError(f"system {self.name!r} has test={self.test!r}; expected 'file::text'")

    @property
    def places(self) -> list[str]:
        """Its objects, "module:attribute" or "module"."""
        return [place.strip() for place in self.where.split(",")]

    @property
    def code(self) -> str:
        """Code by which a user reaches it, as Markdown."""
        names = [place.rpartition(":")[2] for place in self.places]
        return self.shown or ", ".join(f"`{name}`" for name in names)

    @property
    def reach(self) -> str:
        """Status and note in one phrase."""
        return f"{self.status}: {self.note}" if self.note else self.status

    def objects(self) -> list[Any]:
        """Import its objects.

        Raises:
            ImportError, AttributeError: a place that does not exist.
        """
        found = []
        for place in self.places:
            module, _, path = place.partition(":")
            target: Any = import_module(f"{PACKAGE}.{module}")
            for attribute in path.split(".") if path else ():
                target = getattr(target, attribute)
            found.append(target)
        return found
