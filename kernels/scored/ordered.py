"""Scores that depend on the order of tokens: contextual positions, products of reflections, selective attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .rows import Rows, softmax, suffix_sum
from .score import Score, refuse_shape, registered


@registered
@dataclass(frozen=True, eq=False)
class CoPE(Score):
    """Positions that are counted by gates (arXiv:2405.18719, section 4).

    The gate of a pair is sigmoid(logit), 0 where masked. The position of key j is the sum of the gates of all visible
    keys from j on, at most table length - 1; between integers, the products of query and table are interpolated.

    Args:
        table: embeddings of positions `[head_dim, positions]`, shared by heads; zeros are softmax attention.
        scaled: whether the scale of logits is on the position term, too.
    """

    table: Tensor
    scaled: bool = True

    fusibility: ClassVar[str] = "F3"
    has_lse: ClassVar[bool] = True
    fused: ClassVar[str] = "cope"

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """See `Score`."""
        if self.table.dim() != 2 or self.table.shape[0] != query.shape[-1] or self.table.shape[1] < 2:
            refuse_shape(self, "table", f"[head_dim={query.shape[-1]}, 2 or more positions]")

    def attend(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `Score`."""
        logits = rows.logits()
        at = suffix_sum(rows.masked(logits.sigmoid())).clamp(max=self.table.shape[1] - 1)
        below = at.floor().detach()
        known = rows.query @ self.table.to(rows.query)  # [B, heads, rows, positions]
        low = known.gather(-1, below.long())
        high = known.gather(-1, at.ceil().detach().long())
        bias = torch.lerp(low, high, at - below)
        weights, lse = softmax(logits + (bias * rows.scale if self.scaled else bias), rows)
        return weights @ rows.value, lse


@registered
@dataclass(frozen=True, eq=False)
class Path(Score):
    """Causal attention whose relative position is a product of reflections of the tokens between (arXiv:2505.16381).

        s_ij = scale q_i . (I - beta_i w_i w_i^T) ... (I - beta_{j+1} w_{j+1} w_{j+1}^T) k_j + sum of log gates

    The products of all pairs come from one triangular inverse (the UT transform), with N x N logits in memory.

    Args:
        w: unit vectors `[B, *spatial, heads or key heads, head_dim]`.
        beta: strength `[B, *spatial, heads or key heads]`, 0 to 2; 0 is causal softmax attention.
        log_gate: logarithm of a forget gate, in the shape of beta, summed over the tokens between.
        gate_scaled: multiply gates by the scale as logits are, as the released kernels do.
    """

    w: Tensor
    beta: Tensor
    log_gate: Tensor | None = None
    gate_scaled: bool = True

    fusibility: ClassVar[str] = "F3"
    by_rows: ClassVar[bool] = False
    has_lse: ClassVar[bool] = True
    unfused: ClassVar[str] = "its products of reflections change queries and keys from tile to tile"

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """See `Score`."""
        tokens, heads = tuple(query.shape[:2]), {query.shape[2], key.shape[2]}
        if query.shape[1] != key.shape[1]:
            raise ValueError(f"key has {key.shape[1]} tokens; Path needs one for each of {query.shape[1]} queries")
        for name, x, rest in (("w", self.w, query.shape[3:]), ("beta", self.beta, ()), ("log_gate", self.log_gate, ())):
            if x is None:
                continue
            flat = x.flatten(1, -2 - len(rest))
            if flat.shape[:2] != tokens or flat.shape[2] not in heads or flat.shape[3:] != rest:
                refuse_shape(self, name, f"[B, *spatial, heads{', head_dim' if rest else ''}] as query or key have")

    def attend(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `Score`."""
        query, key = rows.query, rows.key
        heads, dtype = query.shape[1], query.dtype
        w = self._of_heads(self.w.flatten(1, -3).transpose(1, 2), heads).to(dtype)  # [B, heads, N, d]
        beta = self._of_heads(self.beta.flatten(1, -2).transpose(1, 2), heads).to(dtype)
        eye = torch.eye(w.shape[2], dtype=dtype, device=w.device)
        paths = eye + (beta[..., None] * (w @ w.mT)).tril(-1)
        right = beta[..., None] * (w @ key.mT).tril(-1)
        inner = torch.linalg.solve_triangular(paths, right, upper=False, unitriangular=True)
        logits = (query @ key.mT).tril() - (query @ w.mT).tril() @ inner
        if self.log_gate is not None:
            gate = self._of_heads(self.log_gate.flatten(1, -2).transpose(1, 2), heads).to(dtype).cumsum(-1)
            between = gate[..., :, None] - gate[..., None, :]
            logits = (logits + between) * rows.scale if self.gate_scaled else logits * rows.scale + between
        else:
            logits = logits * rows.scale
        weights, lse = softmax(logits, rows.causal())
        return weights @ rows.value, lse

    @staticmethod
    def _of_heads(x: Tensor, heads: int) -> Tensor:
        return x.repeat_interleave(heads // x.shape[1], dim=1)


@registered
@dataclass(frozen=True, eq=False)
class Selective(Score):
    """Causal attention in which tokens mask earlier ones for later queries, by the logits of one head.

    From all logits of query i to key j is subtracted the sum of relu(s_tj) of the queries t between, j < t < i, with s
    of the chosen head; nothing is subtracted for the first key. No parameters. The formula is that of the paper
    (arXiv:2410.02703, section 3); no official code is public.

    Args:
        head: whose logits select.
    """

    head: int = 0

    fusibility: ClassVar[str] = "F3"
    by_rows: ClassVar[bool] = False
    has_lse: ClassVar[bool] = True
    unfused: ClassVar[str] = "logits of one head are summed over earlier queries for all heads"

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """See `Score`."""
        if not 0 <= self.head < query.shape[2]:
            raise ValueError(f"score.head={self.head} must lie in [0, heads={query.shape[2]})")
        if query.shape[1] != key.shape[1]:
            raise ValueError(f"key has {key.shape[1]} tokens; Selective needs one for each of {query.shape[1]} queries")

    def attend(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `Score`."""
        rows = rows.causal()
        logits = rows.logits()
        chosen = rows.masked(logits)[:, self.head].relu().tril(-1)
        chosen = chosen * (torch.arange(chosen.shape[-1], device=chosen.device) > 0)
        hidden = chosen.cumsum(-2) - chosen  # of the queries before
        weights, lse = softmax(logits - hidden[:, None], rows)
        return weights @ rows.value, lse
