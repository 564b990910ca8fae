"""Causal attention that keeps the normaliser of full attention (arXiv:2404.06773)."""

from typing import Any

import torch
from timm.layers import apply_rot_embed
from torch import Tensor

from .base import ProjectedAttention2d


def rotate_by_index(x: Tensor, *, theta: float = 10000.0) -> Tensor:
    """Rotary embedding of tokens `[B, N, heads, d]` by their index in N, in pairs of neighbouring channels (RoFormer).

    Pair i of token n turns by n / theta ** (2 i / d), computed in float32 or more.

    Args:
        x: queries or keys; d is even.
        theta: base of the frequencies.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    exponents = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=wide) / x.shape[-1]
    angles = torch.arange(x.shape[1], device=x.device, dtype=wide)[:, None] * theta**-exponents
    angles = angles.repeat_interleave(2, dim=-1)[:, None]  # [N, 1, d]
    return apply_rot_embed(x.to(wide), angles.sin(), angles.cos()).to(x.dtype)


class PostSoftmaxCausalAttention2d(ProjectedAttention2d):
    """Causal attention in row-major order whose mask comes after the softmax (arXiv:2404.06773, sections 3.4 and 3.5).

    Weights of later tokens are multiplied by `softness` after all have been normalised, so a row sums to less than one:
    the result is that of causal attention times exp(lse_causal - lse_full). A class token, first in memory, is last in
    the order and sees every token. Queries and keys are rotated by their place in the order.

    The weights `[B, heads, N, N]` are held in memory: at the 197 tokens of an image that costs less than two fused
    passes would.

    Args:
        dim, num_heads, options: as in `ProjectedAttention2d`.
        softness: weight of later tokens, 0 (causal) to 1 (full); an attribute that training may lower step by step.

    Raises:
        ValueError: softness out of range, or an odd head dimension.
    """

    def __init__(self, dim: int, *, num_heads: int, softness: float = 0.0, **options: Any):
        super().__init__(dim, num_heads=num_heads, **options)
        if not 0 <= softness <= 1:
            raise ValueError(f"softness={softness} must lie in [0, 1]")
        if dim // num_heads % 2:
            raise ValueError(f"dim={dim} over num_heads={num_heads} must be even: channels are rotated in pairs")
        self.softness = softness

    def attend(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Tokens `[B, N, heads, d]` to `[B, N, dim]`."""
        first = int(self.class_token)
        query, key, value = (t.roll(-first, dims=1) for t in (query, key, value))
        query, key = rotate_by_index(query), rotate_by_index(key)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [B, heads, N, d]
        weights = (query * query.shape[-1] ** -0.5 @ key.mT).softmax(dim=-1)
        weights = weights.tril() + self.softness * weights.triu(1)
        return (weights @ value).transpose(1, 2).flatten(2).roll(first, dims=1)

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention for one image; `shape` is H and W, or tokens and dim."""
        tokens = shape[0] if self.class_token else shape[0] * shape[1]
        return 2 * tokens**2 * self.dim
