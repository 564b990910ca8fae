"""Attention as estimation: every key is a noisy, decayed and turned observation of what is at the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .rows import Rows, softmax
from .score import Score, refuse_shape, registered


@registered
@dataclass(frozen=True, eq=False)
class Filter(Score):
    """Weights by the precision of keys as observations of the query (adaptive filter attention).

    Neighbouring channels are complex numbers. Over a distance D of two tokens a key turns by `turn` D and decays by
    E = exp(decay D); its variance and the squared residual against the query are

        V = process (1 - E^2) / (-2 decay) + transport E^2 + noise
        R = |q|^2 + E^2 |k|^2 - 2 E Re(q* k)          of q and the turned k
        logit = sharpness (-log V - log(1 + R / (freedom head_dim V)))         robust
        logit = sharpness (-log V - R / (freedom head_dim V))                  otherwise

    Values turn and decay alike after the softmax, so effective weights sum to at most one. `scale` has no effect.

    Args:
        decay: rate per head `[heads]`, at most 0.
        turn: angle per unit of distance and pair of channels `[heads, head_dim / 2]`, as of a rotary embedding.
        process, transport, noise: variances per head `[heads]`, noise above 0.
        freedom, sharpness: degrees of freedom and factor of the logits.
        robust: heavy tails, as above.
        times: place of each token `[tokens]`; their index when None.
    """

    decay: Tensor
    turn: Tensor
    process: Tensor
    transport: Tensor
    noise: Tensor
    freedom: float = 1.0
    sharpness: float = 1.0
    robust: bool = True
    times: Tensor | None = None

    fusibility: ClassVar[str] = "F1"
    has_lse: ClassVar[bool] = True
    unfused: ClassVar[str] = "keys and values turn and decay by the distance of each pair"

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """See `Score`."""
        heads, dim = query.shape[2:]
        if dim % 2 or value.shape[-1] % 2:
            raise ValueError(
                f"query and value have head_dim {dim} and {value.shape[-1]}; Filter needs pairs of channels"
            )
        if value.shape[-1] != dim or query.shape[1] != key.shape[1]:
            raise ValueError("Filter needs as many keys as queries and value_dim = head_dim: all of them turn alike")
        if self.turn.shape != (heads, dim // 2):
            refuse_shape(self, "turn", f"[heads={heads}, head_dim / 2={dim // 2}]")
        for name in ("decay", "process", "transport", "noise"):
            if getattr(self, name).shape != (heads,):
                refuse_shape(self, name, f"[heads={heads}]")
        if self.times is not None and self.times.shape != (query.shape[1],):
            refuse_shape(self, "times", f"[tokens={query.shape[1]}]")

    def attend(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `Score`."""
        query, key, value = rows.query, rows.key, rows.value
        tokens = key.shape[2]
        times = torch.arange(tokens, device=key.device) if self.times is None else self.times
        times = times.to(query)
        here = times[rows.first : rows.first + query.shape[2]]
        distance = (here[:, None] - times).abs()  # [rows, keys]
        of = {n: getattr(self, n).to(query)[:, None, None] for n in ("decay", "process", "transport", "noise")}
        decayed = (of["decay"] * distance).exp()
        # (1 - E^2) / (-2 decay), which tends to the distance where nothing decays
        rate = -2 * of["decay"]
        grown = torch.where(rate == 0, distance, -torch.expm1(-rate * distance) / rate.masked_fill(rate == 0, 1.0))
        variance = of["process"] * grown + of["transport"] * decayed**2 + of["noise"]
        q, k = self._turn(query, here, -1), self._turn(key, times, -1)
        residual = (q**2).sum(-1)[..., None] + decayed**2 * (k**2).sum(-1)[..., None, :] - 2 * decayed * (q @ k.mT)
        ratio = residual / (self.freedom * query.shape[-1] * variance)
        logits = self.sharpness * (-variance.log() - (ratio.log1p() if self.robust else ratio))
        weights, lse = softmax(logits, rows)
        return self._turn((weights * decayed) @ self._turn(value, times, -1), here, 1), lse

    def _turn(self, x: Tensor, times: Tensor, sign: int) -> Tensor:
        """Pairs of channels of `x [B, heads, tokens, d]`, turned by their angle at a time."""
        angle = sign * times[:, None] * self.turn.to(x)[:, None]  # [heads, tokens, d / 2]
        cos, sin = angle.cos(), angle.sin()
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
