"""Rows of a batch by name: the branches of guidance, "cond" and "uncond", times the prompts of one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..sites.schedule import BRANCHES

GUIDANCE = (*BRANCHES, "both")


@dataclass(frozen=True)
class Rows:
    """Entries of a batch in the order of diffusers: guidance, then prompts, then images per prompt.

    Attributes:
        batch: entries of the batch.
        branches: names of the prompts, such as ("source", "target"); empty when they have none.
        guidance: batch entries of "cond" and "uncond"; one that is not in the batch is missing.

    Raises:
        ValueError: a branch of guidance that does not hold every named prompt equally often.
    """

    batch: int
    branches: tuple[str, ...] = ()
    guidance: Mapping[str, slice] | None = None

    def __post_init__(self) -> None:
        for name, part in self.parts.items():
            if self.branches and len(range(*part.indices(self.batch))) % len(self.branches):
                raise ValueError(
                    f"branches={self.branches} need a batch with the same number of rows for each; the {name!r} part "
                    f"of this batch of {self.batch} has {len(range(*part.indices(self.batch)))}: give the pipeline "
                    f"{len(self.branches)} prompts"
                )

    @property
    def parts(self) -> Mapping[str, slice]:
        """Slices of the branches of guidance; of a batch of which nobody says, all is "cond"."""
        return {"cond": slice(0, self.batch)} if self.guidance is None else self.guidance

    def of(self, branch: str | None = None, guidance: str = "cond") -> tuple[int, ...]:
        """Entries of a prompt in a branch of guidance.

        Args:
            branch: one of `branches`; all when None.
            guidance: "cond", "uncond" or "both".

        Raises:
            ValueError: an unknown name.
        """
        if guidance not in GUIDANCE:
            raise ValueError(f"guidance={guidance!r} must be one of {GUIDANCE}")
        if branch is not None and branch not in self.branches:
            raise ValueError(f"branch={branch!r} must be one of branches={self.branches} of the Control")
        found: list[int] = []
        for name, part in self.parts.items():
            if guidance not in ("both", name):
                continue
            rows = range(*part.indices(self.batch))
            each = len(rows) // max(len(self.branches), 1)
            first = 0 if branch is None else self.branches.index(branch) * each
            found += rows[first : first + each] if branch is not None else rows
        return tuple(found)


def expand(rows: Sequence[int], factor: int) -> list[int]:
    """Rows of an operation that folds `factor` sequences of each batch entry into its batch."""
    return [row * factor + i for row in rows for i in range(factor)]
