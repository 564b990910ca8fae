"""Window attention as a layer: projections and a bias table around `foveal.kernels.ops.window_attention`."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..kernels.common.calling import Impl
from ..kernels.common.symbolic import at_most, known
from ..kernels.ops import relative_bias, window_attention


class WindowAttention2d(nn.Module):
    """Swin's window attention on maps `[B, H, W, dim]` (arXiv:2103.14030).

    Parameters carry the names of the official checkpoints: `qkv` (rows: query, key, value; each head by head), `proj`
    and `relative_position_bias_table`, whose rows are indexed by query - key. Maps of any size go through: a window is
    cut to an axis that is shorter, and an axis no longer than the window is not shifted. Windows at the border have
    fewer tokens where the window does not divide the map.

    Args:
        dim: channels of the input and the output.
        num_heads: heads; a divisor of dim.
        window: side of the windows.
        shift: how far the windows are moved, 0 <= shift < window.
        qkv_bias: whether the projection of queries, keys and values has a bias.
        proj_drop: dropout after the output projection.
        impl: "auto", "triton", "torch" or "reference"; see `foveal.kernels.ops.window_attention`.

    Raises:
        ValueError: num_heads does not divide dim, or a shift outside its range.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        window: int,
        shift: int = 0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        if not 0 <= shift < window:
            raise ValueError(f"shift={shift} must lie in [0, window={window})")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.window, self.shift = dim, num_heads, window, shift
        self.impl: Impl = impl
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bias table anew; submodules have their own `reset_parameters`."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias(self, window: tuple[int, int]) -> Tensor:
        """`[heads, tokens, tokens]` of a window, at most as large as the layer's."""
        side = 2 * self.window - 1
        table = self.relative_position_bias_table.T.unflatten(1, (side, side)).flip(1, 2)  # indexed by key - query
        rows, columns = (slice(self.window - n, self.window + n - 1) for n in window)
        return relative_bias(table[:, rows, columns], window=window)

    def _shift(self, length: int) -> int:
        """0 on an axis no longer than the window."""
        if known(length > self.window) or self.shift == 0:
            return self.shift
        if known(length <= self.window):
            return 0
        longer = torch.sym_min(torch.sym_max(length - self.window, 0), 1)
        return self.shift * longer  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, dim]`; raises ValueError for another shape."""
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, H, W, {self.dim}]")
        size = (x.shape[1], x.shape[2])
        window = (at_most(self.window, size[0]), at_most(self.window, size[1]))
        shift = tuple(self._shift(n) for n in size)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)  # [B, H, W, heads, d]
        out = window_attention(query, key, value, window=window, shift=shift, bias=self.bias(window), impl=self.impl)
        return self.proj_drop(self.proj(out.flatten(3)))

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention for one map of this size, all windows whole."""
        tokens = [min(self.window, n) for n in shape]
        windows = [-(-n // w) for n, w in zip(shape, tokens, strict=True)]
        return 2 * self.dim * windows[0] * windows[1] * (tokens[0] * tokens[1]) ** 2

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window={self.window}, shift={self.shift}"

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("TorchScript cannot compile WindowAttention2d; use torch.export or torch.compile")
