"""Scores that correct the mean of values by their covariance with keys: Parallax and local linear attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .rows import Rows, softmax
from .score import Score, refuse_shape, registered


@registered
@dataclass(frozen=True, eq=False)
class Parallax(Score):
    """Softmax attention less r^T Cov(k, v), the covariance under the weights of the row (arXiv:2605.29157).

    Products r . k are not scaled. The log-sum-exp is that of the softmax.

    Args:
        r: a vector per query `[B, *spatial, heads, head_dim]`; zeros are softmax attention.
    """

    r: Tensor

    fusibility: ClassVar[str] = "F2"
    has_lse: ClassVar[bool] = True
    fused: ClassVar[str] = "parallax"

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """See `Score`."""
        if self.r.flatten(1, -3).shape != query.shape:
            refuse_shape(self, "r", f"that of query, [B, *spatial, heads={query.shape[2]}, {query.shape[3]}]")

    def attend(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `Score`."""
        weights, lse = softmax(rows.logits(), rows)
        r = rows.of(self.r.flatten(1, -3).transpose(1, 2)).to(rows.query)
        tilt = r @ rows.key.mT  # [B, heads, rows, keys]
        mean = (weights * tilt).sum(-1, keepdim=True)
        return (weights * (1 + mean - tilt)) @ rows.value, lse


@registered
@dataclass(frozen=True, eq=False)
class LocalLinear(Score):
    """Local linear regression of values on keys, weighted by the softmax, at the query (arXiv:2510.01450).

        minimise over b, W:  sum_j p_ij |v_j - b - W (k_j - q_i)|^2 + ridge |W|^2,   output b

    Equals `Parallax` with r = (Cov(k) + ridge)^-1 (mean k - q), so it is exact where values are affine in the keys. It
    needs the covariance of each row, head_dim^2 numbers, and a solve: for head_dim up to 32.

    Args:
        ridge: weight of the penalty, above 0; large ones are softmax attention.
    """

    ridge: float = 1.0

    fusibility: ClassVar[str] = "F2"
    has_lse: ClassVar[bool] = True
    unfused: ClassVar[str] = "every row has a covariance of head_dim x head_dim and a system of equations"

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """See `Score`."""
        if not self.ridge > 0:
            raise ValueError(
                f"score.ridge={self.ridge} must be above 0: fewer keys than channels leave nothing to solve"
            )

    def attend(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `Score`."""
        weights, lse = softmax(rows.logits(), rows)
        key, dim = rows.key, rows.key.shape[-1]
        mean = weights @ key
        squares = weights @ (key[..., :, None] * key[..., None, :]).flatten(-2)  # [B, heads, rows, dim * dim]
        covariance = squares.unflatten(-1, (dim, dim)) - mean[..., :, None] * mean[..., None, :]
        regular = covariance + self.ridge * torch.eye(dim, dtype=key.dtype, device=key.device)
        r = torch.linalg.solve(regular, (mean - rows.query)[..., None])[..., 0]
        tilt = r @ key.mT
        middle = (weights * tilt).sum(-1, keepdim=True)
        return (weights * (1 + middle - tilt)) @ rows.value, lse
