"""Scores with two softmaxes: over what is near and over sections, then inside of each section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .rows import Rows, softmax
from .score import Score, registered


@registered
@dataclass(frozen=True, eq=False)
class Landmark(Score):
    """Landmark attention (arXiv:2305.16300, section 3): after `length` tokens stands a landmark of their section.

    One softmax is over the tokens of the query's own section and the landmarks of the others; the weight of a landmark
    is shared among the tokens of its section by a softmax over these. Landmarks have no weight of their own, and nobody
    sees the landmark of the own section. The last section may be shorter; without a landmark others do not see it. With
    `ColumnMask.causal` it is the published form.

    Args:
        length: tokens of a section, without its landmark.
    """

    length: int

    fusibility: ClassVar[str] = "F3"
    unfused: ClassVar[str] = "every section has a softmax of its own"

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """See `Score`."""
        if self.length < 1:
            raise ValueError(f"score.length={self.length} must be at least 1 token")
        if query.shape[1] != key.shape[1]:
            raise ValueError(f"Landmark needs as many queries as keys, and has {query.shape[1]} and {key.shape[1]}")

    def attend(self, rows: Rows) -> tuple[Tensor, None]:
        """See `Score`."""
        logits, size = rows.logits(), self.length + 1
        tokens = logits.shape[-1]
        at = torch.arange(tokens, device=logits.device)
        own = at[rows.first : rows.first + logits.shape[2], None] // size == at // size
        marks = at % size == self.length

        # own tokens, and landmarks of other sections
        outer = own ^ marks  # a landmark of the own section is neither
        visible = outer if rows.visible is None else outer & rows.visible
        weights, _ = softmax(logits, rows._replace(visible=visible))

        # tokens of each section among themselves
        inside = ~marks if rows.visible is None else ~marks & rows.visible
        missing = -tokens % size
        parts = F.pad(logits, (0, missing)).unflatten(-1, (-1, size))
        there = F.pad(inside.expand(logits.shape), (0, missing)).unflatten(-1, (-1, size))
        inner, _ = softmax(parts, rows._replace(visible=there))
        of_mark = F.pad(weights * marks, (0, missing)).unflatten(-1, (-1, size))[..., -1:]
        shared = (inner * of_mark).flatten(-2)[..., :tokens]
        return (weights.masked_fill(marks, 0.0) + shared) @ rows.value, None
