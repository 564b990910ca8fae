"""Mixing of tokens by learnt matrices of one grid: MLPs along all tokens, rows or columns."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn


def check_grid(x: Tensor, dim: int, grid_size: Sequence[int]) -> None:
    """Raises a ValueError unless x is `[B, H, W, dim]` of this grid."""
    if x.dim() != 4 or tuple(x.shape[1:]) != (*grid_size, dim):
        rows, columns = grid_size
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected [B, {rows}, {columns}, {dim}]: the layer is learnt for one grid, "
            "which img_size= of its model chooses"
        )


class TokenMlp2d(Mlp):
    """Two linear layers along the tokens of `[B, H, W, dim]`, the same for every channel (arXiv:2105.01601).

    Args:
        dim: channels.
        grid_size: H and W, for which the layer is learnt.
        ratio: hidden over incoming tokens.
        act_layer: activation.
        drop: dropout after both layers.
    """

    def __init__(
        self,
        dim: int,
        *,
        grid_size: tuple[int, int],
        ratio: float = 0.5,
        act_layer: type[nn.Module] = nn.GELU,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        tokens = grid_size[0] * grid_size[1]
        super().__init__(tokens, int(tokens * ratio), act_layer=act_layer, drop=drop, device=device, dtype=dtype)
        self.dim, self.grid_size = dim, (grid_size[0], grid_size[1])

    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Nothing for the grid that the layer is learnt for; raises ValueError for another."""
        if tuple(grid_size) != self.grid_size:
            raise ValueError(f"grid_size={grid_size} must be {self.grid_size}: an MLP along tokens keeps its grid")

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, dim]`; raises ValueError for another grid."""
        check_grid(x, self.dim, self.grid_size)
        return super().forward(x.flatten(1, 2).transpose(1, 2)).transpose(1, 2).unflatten(1, self.grid_size)


class SparseMlp2d(nn.Module):
    """Linear layers along rows and along columns of `[B, H, W, dim]`, fused with the map itself (arXiv:2109.05422).

    Batch norm and GELU come first. Each token meets those of its row and its column.

    Args:
        dim: channels.
        grid_size: H and W, for which the layers are learnt.
        act_layer: activation.
    """

    def __init__(
        self,
        dim: int,
        *,
        grid_size: tuple[int, int],
        act_layer: type[nn.Module] = nn.GELU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.grid_size = dim, (grid_size[0], grid_size[1])
        rows, columns = grid_size
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.act = act_layer()
        self.along_rows = nn.Conv2d(columns, columns, 1, **dd)
        self.along_columns = nn.Conv2d(rows, rows, 1, **dd)
        self.fuse = nn.Linear(3 * dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, dim]`; raises ValueError for another grid."""
        check_grid(x, self.dim, self.grid_size)
        x = self.act(self.norm(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        by_row = self.along_rows(x.transpose(1, 2)).transpose(1, 2)  # columns of a map are channels of a convolution
        by_column = self.along_columns(x)
        return self.fuse(torch.cat([x, by_row, by_column], dim=-1))
