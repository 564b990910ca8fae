"""Scores: how logits become weights, one frozen dataclass a formula. A score knows no device and no memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.utils._pytree import register_dataclass

from .rows import Rows

CLASSES = {
    "F0": "queries, keys and values are prepared before, so any attention will do",
    "F1": "element-wise on logits: one pass",
    "F2": "statistics of whole rows before weights are final: two passes, or several sums in one",
    "F3": "neighbouring logits of a row or column: one pass in the right order, or a halo",
    "F4": "all heads or all rows at once: logits are held in memory",
}


@dataclass(frozen=True, eq=False)
class Score:
    """Base of all scores: from logits to an output.

    Attributes:
        fusibility: key of `CLASSES`, which decides how a kernel can compute it.
        by_rows: whether rows are independent given all keys, so that queries go in chunks.
        has_lse: whether a log-sum-exp of the weights is defined.
        fused: name of the formula in the Triton kernels; empty where they do not have it.
        unfused: why not.
    """

    fusibility: ClassVar[str] = "F1"
    by_rows: ClassVar[bool] = True
    has_lse: ClassVar[bool] = False
    fused: ClassVar[str] = ""
    unfused: ClassVar[str] = "the kernels do not have its formula"

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Refuse parameters that do not fit the operands `[B, tokens, heads, dim]`.

        Raises:
            ValueError, TypeError: the message names the parameter and its value.
        """

    def attend(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """Output `[B, heads, rows, value_dim]`, and log-sum-exp `[B, heads, rows]` where it is defined."""
        raise NotImplementedError


def registered(cls: type) -> type:
    """Decorate a score: its tensors are leaves of a pytree, so that tracing, vmap and `explain` see them."""
    register_dataclass(cls)
    return cls


def refuse_shape(score: Score, name: str, expected: str) -> None:
    """Raise a ValueError about the shape of a parameter."""
    x = getattr(score, name)
    raise ValueError(f"score.{name}.shape={tuple(x.shape)} must be {expected} for {type(score).__name__}")
