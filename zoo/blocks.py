"""The transformer block that small networks of this folder share."""

from torch import Tensor, nn


class PreNormBlock(nn.Module):
    """Attention, or what is given in its place, and two layers, each behind a norm and beside a residual.

    Args:
        dim: channels.
        attention: from `[…, dim]` to the same shape; further arguments of the block go to it.
        mlp_ratio: hidden channels of the two layers over dim.
    """

    def __init__(self, dim: int, attention: nn.Module, *, mlp_ratio: float = 2.0):
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(dim), nn.LayerNorm(dim), attention
        hidden = int(mlp_ratio * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, *options: Tensor) -> Tensor:
        """`[…, dim]` to the same shape."""
        x = x + self.attn(self.norm1(x), *options)
        return x + self.mlp(self.norm2(x))
