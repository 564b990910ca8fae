"""Attention as a bottleneck: a head that decides by one row of attention, which a person can edit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _OneHead(nn.Module):
    """Parameters of `nn.MultiheadAttention`, whose names the official files have."""

    def __init__(self, dim: int, **dd: Any):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim, **dd))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim, **dd))
        self.out_proj = nn.Linear(dim, dim, **dd)
        nn.init.xavier_uniform_(self.in_proj_weight)


class BottleneckAttention(nn.Module):
    """One head whose class-token row is scaled by the weight that it leaves for patches (TAB, arXiv:2412.18675).

    With a0 the weight of the class token's row on the class token, the row is multiplied by 1 - a0 after the softmax:
    where a0 is one, the row is zero and the result does not depend on the images.

    Args:
        dim: channels of the tokens.
    """

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        self.attn = _OneHead(dim, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, other: Tensor | None = None, *, override: Tensor | Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend from `x` to `other`, without a residual.

        Args:
            x: tokens `[B, N, dim]`, class token first.
            other: tokens `[B, M, dim]` of another image, class token first; x itself when None.
            override: the class token's row `[B, M]` instead of the computed one, or a function of it; before the gate.

        Returns:
            tokens `[B, N, dim]`, and the weights without the gate, `[B, N, M]`.

        Raises:
            ValueError: an overriding row of another shape.
        """
        other = x if other is None else other
        wq, wk, wv = self.attn.in_proj_weight.chunk(3)
        bq, bk, bv = self.attn.in_proj_bias.chunk(3)
        query = nn.functional.linear(x, wq, bq) * x.shape[-1] ** -0.5
        key, value = nn.functional.linear(other, wk, bk), nn.functional.linear(other, wv, bv)
        weights = (query @ key.mT).softmax(-1)
        row = weights[:, 0]
        if override is not None:
            row = override if isinstance(override, Tensor) else override(row)
            if row.shape != weights[:, 0].shape:
                raise ValueError(f"override gives {tuple(row.shape)}; expected {tuple(weights[:, 0].shape)}")
        gated = torch.cat([(row * (1 - row[:, :1]))[:, None], weights[:, 1:]], dim=1)
        shown = weights if override is None else torch.cat([row[:, None], weights[:, 1:]], dim=1)
        return self.attn.out_proj(gated @ value), shown
