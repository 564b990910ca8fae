"""Attention among the tokens that a gate selects; all others pass (SPA, arXiv:2410.23608)."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SelectedAttention(nn.Module):
    """Attention of `[B, *spatial, dim]` among selected tokens of the same image; 0 for the others.

    A linear layer gives each token a logit. In training the choice is a hard sample of its sigmoid with Gumbel noise,
    whose gradient is that of the soft sample; in evaluation it is the sign of the logit. The selected tokens of all
    images are packed and attended to at the cost of the image that has most of them, whose number is read from the
    device. No code is public: the gate's noise and temperature are ours.

    Args:
        dim: channels.
        num_heads: heads, a divisor of dim.
        qkv_bias: whether the projections of queries, keys and values have a bias.
        temperature: of the soft sample.

    Raises:
        ValueError: heads that do not divide the channels, or a temperature that is not positive.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        qkv_bias: bool = True,
        temperature: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads or temperature <= 0:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}, temperature={temperature} be positive")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.temperature = num_heads, temperature
        self.gate = nn.Linear(dim, 1, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.gate_logits: Tensor | None = None

    def select(self, x: Tensor) -> Tensor:
        """1 for the selected of the tokens `[B, N, dim]`, 0 for the others, as `[B, N, 1]` in their dtype.

        `gate_logits` becomes the logits `[B, N]`, for `selection_loss`.
        """
        logits = self.gate(x)
        self.gate_logits = logits[..., 0] if self.training else None
        if not self.training:
            return (logits > 0).to(x.dtype)
        uniform = torch.rand_like(logits).clamp_min(torch.finfo(logits.dtype).tiny)
        soft = ((logits + torch.logit(uniform, eps=1e-6)) / self.temperature).sigmoid()
        return (soft > 0.5).to(x.dtype) + soft - soft.detach()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, *spatial, dim]` to `[B, *spatial, dim]`, for a residual branch."""
        tokens = x.flatten(1, -2)
        gates = self.select(tokens)
        chosen = gates[..., 0].detach() > 0.5
        most = int(chosen.sum(1).max())
        if most == 0:
            return torch.zeros_like(x) + 0 * gates.sum()
        places = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most, None]  # selected first
        there = chosen.gather(1, places[..., 0])[:, None, None]  # [B, 1, 1, most]
        packed = tokens.gather(1, places.expand(-1, -1, tokens.shape[-1]))
        q, k, v = self.qkv(packed).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mask = there | ~there.any(-1, keepdim=True)  # an image without selected tokens attends to anything, for no use
        out = self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        out = out * gates.gather(1, places)  # 0 for what only fills up, and the way of the gradient to the gate
        return torch.zeros_like(tokens).scatter(1, places.expand_as(out), out.to(tokens.dtype)).view_as(x)


def selection_loss(logits: Tensor, labels: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Cross-entropy of a gate with labels of pixels: a token is positive if any of its pixels is.

    Args:
        logits: of the tokens `[B, N]`.
        labels: bool or numbers `[B, H, W]`, positive inside of boxes or masks of objects.
        grid: rows and columns of the tokens.

    Returns:
        mean over tokens.

    Raises:
        ValueError: a grid of another number of tokens.
    """
    if prod(grid) != logits.shape[1]:
        raise ValueError(f"grid={grid} has {prod(grid)} tokens; logits are {tuple(logits.shape)}")
    positive = F.adaptive_max_pool2d((labels > 0).to(logits)[:, None], grid).flatten(1)
    return F.binary_cross_entropy_with_logits(logits, positive)
