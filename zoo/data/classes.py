"""The one table from class to label: made once, from the training images, and handed to whoever reads or names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from timm.utils import natural_key

SHOWN = 8  # names that a message lists


def listed(names: Iterable[str], most: int = SHOWN) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def recorded(names: Iterable[str]) -> dict[str, list[str]]:
    """The configuration that gives these names again, without interpolation."""
    return {"class_names": [name.replace("${", r"\${") for name in names]}


@dataclass(frozen=True)
class ClassTable:
    """Names of classes, by label.

    Args:
        names: `names[label]`, each once.

    Raises:
        ValueError: no names, or one of them twice.
    """

    names: tuple[str, ...]

    def __post_init__(self):
        if not self.names:
            raise ValueError("data.class_names=[] must name at least one class")
        if len(self.labels) != len(self.names):
            twice = next(name for i, name in enumerate(self.names) if name in self.names[:i])
            raise ValueError(f"data.class_names names {twice!r} twice")

    @classmethod
    def of(cls, names: Iterable[str]) -> ClassTable:
        """The table of these classes in natural order, which is timm's: 1, 2, 10 and a, B, c."""
        return cls(tuple(sorted(set(names), key=lambda name: (natural_key(name), name))))

    @cached_property
    def labels(self) -> dict[str, int]:
        """Labels by name."""
        return {name: label for label, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def check(self, found: Iterable[str], *, where: str, owner: str = "training") -> None:
        """Refuse classes that are not in the table.

        Args:
            found: names of classes.
            where: they were found, for the message; a folder or a file.
            owner: what the table was made from.

        Raises:
            ValueError: names the classes and the place.
        """
        unknown = set(found) - self.labels.keys()
        if unknown:
            raise ValueError(
                f"{where} has images of {listed(ClassTable.of(unknown).names)}, which {owner} does not have: "
                f"its classes are {listed(self.names)}"
            )

    def relabel(self, names: Sequence[str]) -> tuple[int, ...]:
        """This table's label of each class in another numbering."""
        return tuple(self.labels[name] for name in names)
