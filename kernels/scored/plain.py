"""Scores of single logits: softmax, signed weights, softplus."""

from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .rows import Rows, normalize, softmax
from .score import Score, registered


@registered
@dataclass(frozen=True, eq=False)
class Softmax(Score):
    """Plain softmax attention."""

    fusibility: ClassVar[str] = "F1"
    has_lse: ClassVar[bool] = True
    fused: ClassVar[str] = "softmax"

    def attend(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `Score`."""
        weights, lse = softmax(rows.logits(), rows)
        return weights @ rows.value, lse


@registered
@dataclass(frozen=True, eq=False)
class Signed(Score):
    """Weights with the sign of their logit, sign(s) softmax(|s|), whose absolute values sum to one (Cog attention).

    The log-sum-exp is that of |s|. Source: arXiv:2411.07176, section 3.
    """

    fusibility: ClassVar[str] = "F1"
    has_lse: ClassVar[bool] = True
    fused: ClassVar[str] = "signed"

    def attend(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `Score`."""
        logits = rows.logits()
        weights, lse = softmax(logits.abs(), rows)
        return (weights * logits.sign()) @ rows.value, lse


@registered
@dataclass(frozen=True, eq=False)
class Softplus(Score):
    """Weights softplus(s) over their sum, and a power of what exceeds the mean weight (arXiv:2501.13428).

    With n visible keys and weights a of the first stage, the second is relu(n a - offset) ** power over its sum; a row
    of which nothing is left keeps the first stage. Constants of the paper's released models are not public: the
    defaults are the formula of the first stage alone.

    Args:
        power: of the second stage; 0 leaves it out.
        offset: of the second stage; 1 is the mean weight.
        length_scale: multiply logits by log(head_dim) log(n), which keeps the entropy of rows of other lengths.
    """

    power: float = 0.0
    offset: float = 1.0
    length_scale: bool = False

    fusibility: ClassVar[str] = "F2"
    fused: ClassVar[str] = "softplus"

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """See `Score`."""
        if self.power < 0:
            raise ValueError(f"score.power={self.power} must not be negative")

    def attend(self, rows: Rows) -> tuple[Tensor, None]:
        """See `Score`."""
        logits, count = rows.logits(), rows.counts()
        if self.length_scale:
            logits = logits * (log(rows.query.shape[-1]) * count.clamp_min(1).log())
        weights = normalize(rows.masked(F.softplus(logits)))
        if self.power > 0:
            sharp = (weights * count - self.offset).relu()
            sharp = torch.where(sharp > 0, sharp, 1.0) ** self.power * (sharp > 0)  # no gradient of 0 ** power
            kept = sharp.sum(-1, keepdim=True) > 0
            weights = torch.where(kept, normalize(rows.masked(sharp)), weights)
        return weights @ rows.value, None
