"""Scores that mix logits or weights of neighbouring pairs and of heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from .rows import Rows, softmax
from .score import Score, refuse_shape, registered


@registered
@dataclass(frozen=True, eq=False)
class MultiToken(Score):
    """Convolutions of logits and of weights over queries and keys, and mixtures of heads (arXiv:2504.00927, section 3).

    Masked logits are 0 in the first convolution and masked weights are 0 after the second, whose rows need not sum to
    one. A convolution sees the current and earlier queries, and keys on both sides.

    Args:
        kernel: of the logits, `[heads, 1, queries, keys]`, keys odd; None leaves the convolution out. A one in the last
            query and the middle key is softmax attention.
        after: of the weights, likewise.
        heads: mixture of the weights of groups of heads, `[groups, heads per group, heads per group]` from the second
            axis to the third; None leaves it out.
    """

    kernel: Tensor | None = None
    after: Tensor | None = None
    heads: Tensor | None = None

    fusibility: ClassVar[str] = "F4"
    by_rows: ClassVar[bool] = False
    unfused: ClassVar[str] = "it mixes logits of neighbouring queries and keys, and weights of all heads"

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """See `Score`."""
        count = query.shape[2]
        for name, x in (("kernel", self.kernel), ("after", self.after)):
            if x is not None and (x.dim() != 4 or x.shape[:2] != (count, 1) or x.shape[3] % 2 == 0):
                refuse_shape(self, name, f"[heads={count}, 1, queries, odd number of keys]")
        x = self.heads
        if x is not None and (x.dim() != 3 or x.shape[1] != x.shape[2] or x.shape[0] * x.shape[1] != count):
            refuse_shape(self, "heads", f"[groups, size, size] with groups * size = heads={count}")

    def attend(self, rows: Rows) -> tuple[Tensor, None]:
        """See `Score`."""
        logits = rows.logits()
        if self.kernel is not None:
            logits = _convolve(rows.masked(logits), self.kernel)
        weights, _ = softmax(logits, rows)
        if self.after is not None:
            weights = rows.masked(_convolve(weights, self.after))
        if self.heads is not None:
            grouped = weights.unflatten(1, self.heads.shape[:2])
            weights = (self.heads.to(weights).mT @ grouped.flatten(-2)).view_as(weights)
        return weights @ rows.value, None


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise convolution of `[B, heads, queries, keys]`: causal over queries, centred over keys."""
    queries, keys = kernel.shape[2:]
    padded = F.pad(x, (keys // 2, keys // 2, queries - 1, 0))
    return F.conv2d(padded, kernel.to(x), groups=x.shape[1])
