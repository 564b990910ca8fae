"""Dense attention on a map of fixed size, with a relative position bias."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.common.symbolic import known


def resize_bias_table(table: Tensor, size: Sequence[int]) -> Tensor:
    """Relative position table `[heads, 2h - 1, 2w - 1]` at another size, bicubic; itself when the size is right."""
    if all(known(old == new) for old, new in zip(table.shape[1:], size, strict=True)):
        return table
    resized = F.interpolate(table[None].float(), size=tuple(size), mode="bicubic", align_corners=False)
    return resized[0].to(table.dtype)


class RelativeAttention2d(nn.Module):
    """Every token attends to every token of an `[H, W]` map, with a bias per offset: ViT-rpb of arXiv:2209.15001.

    Args:
        dim: channels of the input and the output.
        num_heads: heads; a divisor of dim.
        grid_size: H and W. The table `rpb` is `[num_heads, 2H - 1, 2W - 1]`, indexed by key - query + size - 1.
        qkv_bias: whether `qkv` (rows: query, key, value; each head by head) has a bias.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: dim is no multiple of num_heads; `forward` gets another grid.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        grid_size: tuple[int, int],
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.grid_size = num_heads, tuple(grid_size)
        self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * n - 1 for n in self.grid_size), **dd))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bias table anew; submodules have their own `reset_parameters`."""
        nn.init.trunc_normal_(self.rpb, std=0.02)

    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Interpolate the bias table for maps of another size."""
        self.grid_size = tuple(grid_size)
        table = resize_bias_table(self.rpb.detach(), [2 * n - 1 for n in self.grid_size])
        self.rpb = nn.Parameter(table, requires_grad=self.rpb.requires_grad)

    def bias(self) -> Tensor:
        """The table spread over all pairs: `[num_heads, H * W, H * W]`."""
        rows, columns = (torch.arange(n, device=self.rpb.device) for n in self.grid_size)
        by_row = self.rpb[:, rows - rows[:, None] + len(rows) - 1]  # [heads, Hq, Hk, 2W - 1]
        spread = by_row[..., columns - columns[:, None] + len(columns) - 1]  # [heads, Hq, Hk, Wq, Wk]
        return spread.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, dim]`."""
        if tuple(x.shape[1:3]) != self.grid_size:
            raise ValueError(f"x has a map of {tuple(x.shape[1:3])}; expected grid_size={self.grid_size}")
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, heads, d]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, T, d]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias().to(query.dtype)[None])
        out = out.transpose(1, 2).flatten(2).unflatten(1, self.grid_size)
        return self.proj_drop(self.proj(out))

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("TorchScript cannot compile RelativeAttention2d; use torch.export instead")
