"""Steps that scores share: logits of some rows, their softmax, sums along the keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Some queries of a call and all of its keys, in the precision of the computation.

    Attributes:
        query: `[B, heads, rows, head_dim]`.
        key, value: `[B, heads, keys, head_dim]` and `[…, value_dim]`.
        visible: bool, broadcastable to `[B, heads, rows, keys]`; None when every key is visible.
        scale: factor on query . key.
        first: index of the first of the rows among all queries.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    scale: float
    first: int

    def logits(self) -> Tensor:
        """Scaled products `[B, heads, rows, keys]`, masked ones included."""
        return self.query @ self.key.mT * self.scale

    def masked(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """`x [B, heads, rows, keys]` with another value at masked places."""
        return x if self.visible is None else x.masked_fill(~self.visible, fill)

    def of(self, x: Tensor) -> Tensor:
        """These rows of `x [B, heads, queries, …]`."""
        return x[:, :, self.first : self.first + self.query.shape[2]]

    def counts(self) -> Tensor:
        """Number of visible keys per row, broadcastable to `[B, heads, rows, 1]`."""
        if self.visible is None:
            return self.query.new_tensor(float(self.key.shape[2])).view(1, 1, 1, 1)
        return self.visible.sum(-1, keepdim=True).to(self.query)

    def causal(self) -> Rows:
        """The same rows, which see no key after their own index."""
        rows = torch.arange(self.first, self.first + self.query.shape[2], device=self.query.device)
        before = torch.arange(self.key.shape[2], device=self.query.device) <= rows[:, None]
        return self._replace(visible=before if self.visible is None else before & self.visible)


def softmax(logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Weights `[…, rows, keys]` and log-sum-exp `[…, rows]`; 0 and -inf in a row that sees nothing."""
    logits = rows.masked(logits, -torch.inf)
    peak = logits.detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)  # exp(-inf - 0) is 0, and so is its gradient
    weights = (logits - peak).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    lse = (total.masked_fill(empty, 1.0).log() + peak).masked_fill(empty, -torch.inf)
    return weights / total.masked_fill(empty, 1.0), lse[..., 0]


def normalize(weights: Tensor) -> Tensor:
    """Rows of non-negative weights, divided by their sums; rows of zeros stay."""
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


def suffix_sum(x: Tensor) -> Tensor:
    """Sum of each entry and all behind it, along the last axis."""
    return x.flip(-1).cumsum(-1).flip(-1)
