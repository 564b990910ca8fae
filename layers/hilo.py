"""HiLo attention: high frequencies in small windows, low frequencies over pooled keys (arXiv:2205.13213)."""

from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.common.calling import Impl
from ..kernels.ops import window_attention
from .completion import complete_multiples, crop


class HiLo(nn.Module):
    """Some heads attend inside small windows (Hi-Fi), the others to a pooled map (Lo-Fi); arXiv:2205.13213, section 3.

    Parameters carry the names of the official checkpoints: `h_qkv` (rows: query, key, value; each head by head),
    `h_proj`, `l_q`, `l_kv` (rows: key, value), `l_proj`. Maps that the windows do not divide are zero-padded right and
    bottom before the projections, without a mask, as in the official detection code: padded tokens are keys of their
    window and count in the pooled cells.

    Args:
        dim: channels of the input and the output; the first of the output are Hi-Fi's.
        num_heads: heads of both branches together; a divisor of dim.
        window: side of the windows and of the pooled cells. 1 is plain attention: every head is Lo-Fi, nothing is
            pooled and alpha has no meaning.
        alpha: share of the heads that are Lo-Fi, 0 to 1, rounded down to whole heads.
        qkv_bias: whether the projections of queries, keys and values have a bias.
        proj_drop: dropout after the output projections.
        impl: implementation of the windows: "auto", "triton", "torch" or "reference"; see
            `foveal.kernels.ops.window_attention`.

    Raises:
        ValueError: dim is no multiple of num_heads; alpha is outside of 0 to 1; window is below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        window: int = 2,
        alpha: float = 0.5,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be from 0 to 1")
        if window < 1:
            raise ValueError(f"window={window} must be at least 1")
        dd = {"device": device, "dtype": dtype}
        self.dim, self.window, self.head_dim = dim, window, dim // num_heads
        self.impl: Impl = impl
        self.low_heads = num_heads if window == 1 else int(num_heads * alpha)
        self.high_heads = num_heads - self.low_heads
        low, high = self.low_heads * self.head_dim, self.high_heads * self.head_dim
        if low:
            self.l_q = nn.Linear(dim, low, bias=qkv_bias, **dd)
            self.l_kv = nn.Linear(dim, 2 * low, bias=qkv_bias, **dd)
            self.l_proj = nn.Linear(low, low, **dd)
        if high:
            self.h_qkv = nn.Linear(dim, 3 * high, bias=qkv_bias, **dd)
            self.h_proj = nn.Linear(high, high, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, dim]`.

        Raises:
            ValueError: a shape that does not fit.
        """
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, H, W, {self.dim}]")
        padded = complete_multiples(x, (self.window, self.window))
        branches = []
        if self.high_heads:
            branches.append(crop(self._high(padded), x.shape[1:3]))
        if self.low_heads:
            branches.append(self._low(x, padded))
        return self.proj_drop(torch.cat(branches, dim=-1) if len(branches) > 1 else branches[0])

    def _high(self, x: Tensor) -> Tensor:
        query, key, value = self.h_qkv(x).unflatten(-1, (3, self.high_heads, self.head_dim)).unbind(-3)
        out = window_attention(query, key, value, window=self.window, impl=self.impl)  # [B, H, W, heads, d]
        return self.h_proj(out.flatten(-2))

    def _low(self, x: Tensor, padded: Tensor) -> Tensor:
        if self.window > 1:
            padded = F.avg_pool2d(padded.permute(0, 3, 1, 2), self.window).permute(0, 2, 3, 1)
        heads = (self.low_heads, self.head_dim)
        query = self.l_q(x).unflatten(-1, heads).flatten(1, 2)  # [B, H * W, heads, d]
        key, value = self.l_kv(padded).unflatten(-1, (2, *heads)).flatten(1, 2).unbind(2)  # [B, cells, heads, d]
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return self.l_proj(out.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3]))

    def attention_macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates of the products of queries, keys and values for one map of this size."""
        cells = -(-grid[0] // self.window) * -(-grid[1] // self.window)
        seen = self.high_heads * self.window**4 * cells + self.low_heads * grid[0] * grid[1] * cells
        return 2 * self.head_dim * seen

    def extra_repr(self) -> str:
        return f"window={self.window}, high_heads={self.high_heads}, low_heads={self.low_heads}"

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("TorchScript cannot compile HiLo; use torch.export or torch.compile instead")
