"""Attention whose queries, keys and values are convolutions along a sequence, mixed over kernel sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvolvedAttention(nn.Module):
    """Multi-head attention of `[B, N, dim]` with convolved queries, keys and values (ConvFormer, arXiv:2304.02147).

    Each is a sum of convolutions along the tokens with several kernel sizes, weighed by the softmax of learned numbers
    that begin equal. The authors published no code: groups and order are ours. With one kernel of size 1 and one group
    it is multi-head attention.

    Args:
        dim: channels.
        num_heads: heads, a divisor of dim.
        kernels: odd sizes of the convolutions.
        groups: of the convolutions, a divisor of dim; `num_heads` when None.

    Raises:
        ValueError: heads or groups that do not divide the channels, or kernels that are not odd.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        kernels: Sequence[int] = (1, 3, 5),
        groups: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        groups = num_heads if groups is None else groups
        if dim % num_heads or dim % groups or not kernels or any(k < 1 or k % 2 == 0 for k in kernels):
            raise ValueError(
                f"num_heads={num_heads} and groups={groups} must divide dim={dim}, and kernels={tuple(kernels)} be odd"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.convolutions = nn.ModuleList(
            nn.ModuleList(nn.Conv1d(dim, dim, k, padding=k // 2, groups=groups, **dd) for k in kernels)
            for _ in range(3)  # queries, keys, values
        )
        self.mixture = nn.Parameter(torch.zeros(3, len(kernels), **dd))
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, dim]` to `[B, N, dim]`."""
        shares, made = self.mixture.softmax(-1), []
        for convolutions, share in zip(self.convolutions, shares, strict=True):
            mixed = sum(s * convolve(x.mT) for s, convolve in zip(share, convolutions, strict=True))  # pyright: ignore
            made.append(mixed.mT.unflatten(-1, (self.num_heads, -1)).transpose(1, 2))  # pyright: ignore
        return self.proj(F.scaled_dot_product_attention(*made).transpose(1, 2).flatten(2))
