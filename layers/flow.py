"""Flow-attention: linear attention whose tokens share out a conserved flow (arXiv:2202.06258)."""

from typing import Any

import torch
from torch import Tensor

from ..kernels.ops import linear_attention
from .base import BranchMixin, ProjectedAttention2d

SMALL = 1e-6


class FlowAttention2d(ProjectedAttention2d):
    """Flow-attention of all tokens of a map `[B, H, W, dim]` (arXiv:2202.06258, section 4.2).

    With features f = sigmoid, every query takes in a flow of f(q) · sum f(k) and every key gives f(k) · sum f(q). Once
    each key gives a flow of 1, what queries take in *allocates* their outputs, by a sigmoid; once each query takes in
    1, what keys give makes them *compete* by a softmax over keys, which weighs values. The cost is linear in the number
    of tokens.

    Args:
        dim, num_heads, options: as in `ProjectedAttention2d`.
        floor: added to every flow; 1e-6 in the authors' image models, 0 in their general layer.
    """

    def __init__(self, dim: int, *, num_heads: int, floor: float = SMALL, **options: Any):
        super().__init__(dim, num_heads=num_heads, **options)
        if floor < 0:
            raise ValueError(f"floor={floor} must be at least 0")
        self.floor = floor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Tokens `[B, N, heads, d]` to `[B, N, dim]`."""
        wide = torch.promote_types(query.dtype, torch.float32)
        sinks, sources = query.to(wide).sigmoid(), key.to(wide).sigmoid()  # [B, N, heads, d]
        incoming = 1 / self._flow(sinks, sources.sum(1, keepdim=True))  # [B, N, heads, 1]
        outgoing = 1 / self._flow(sources, sinks.sum(1, keepdim=True))
        conserved_sinks = self._flow(sinks, (sources * outgoing).sum(1, keepdim=True))
        conserved_sources = self._flow(sources, (sinks * incoming).sum(1, keepdim=True)).clamp(-1, 1)
        competition = conserved_sources.softmax(1) * key.shape[1]
        allocation = conserved_sinks.sigmoid()  # as many sinks as sources, whose ratio the paper multiplies by
        weighted, scaled = (value * competition).to(value.dtype), (sinks * incoming).to(value.dtype)
        out = linear_attention(scaled, sources.to(value.dtype), weighted, impl=self.impl)
        return (out * allocation).to(value.dtype).flatten(2)

    def _flow(self, tokens: Tensor, total: Tensor) -> Tensor:
        return ((tokens + SMALL) * (total + SMALL)).sum(-1, keepdim=True) + self.floor

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates for one image, of the state, what is read of it and four flows; `shape` is H and W."""
        tokens = shape[0] if self.class_token else shape[0] * shape[1]
        return tokens * self.dim * (2 * self.dim // self.num_heads + 4)


class FlowBranch2d(BranchMixin, FlowAttention2d):
    """Flow-attention as a branch of CSWin's blocks."""
