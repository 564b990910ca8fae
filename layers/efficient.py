"""Efficient attention: softmaxes over positions and over channels instead of one over pairs (arXiv:1812.01243)."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..kernels.common.calling import Impl
from ..kernels.ops import linear_attention


class EfficientAttention2d(nn.Module):
    """Efficient attention on `[B, H, W, dim]` (arXiv:1812.01243, section 3.2).

    Each channel of the keys is a softmax over all tokens: a map of where its *context* is gathered, the sum of values
    under it. Queries are softmaxes over channels, which mix contexts. The cost is linear in the number of tokens.

    Parameters are named as in the official code, whose 1x1 convolutions are linear layers here: `keys`, `queries`,
    `values`, `reprojection`. Its layer adds the input to the result; this one does not.

    Args:
        dim: channels of the input and the output.
        key_dim, value_dim: channels of queries and keys, and of values; multiples of num_heads.
        num_heads: heads.
        proj_drop: dropout after the output projection.
        impl: "auto", "triton", "tiled" or "reference"; see `foveal.kernels.ops.linear_attention`.

    Raises:
        ValueError: num_heads does not divide key_dim and value_dim; `forward` gets another shape.
    """

    def __init__(
        self,
        dim: int,
        *,
        key_dim: int,
        value_dim: int,
        num_heads: int = 1,
        proj_drop: float = 0.0,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if key_dim % num_heads or value_dim % num_heads:
            raise ValueError(f"key_dim={key_dim}, value_dim={value_dim} must be multiples of num_heads={num_heads}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.key_dim, self.value_dim, self.num_heads = dim, key_dim, value_dim, num_heads
        self.impl: Impl = impl
        self.keys = nn.Linear(dim, key_dim, **dd)
        self.queries = nn.Linear(dim, key_dim, **dd)
        self.values = nn.Linear(dim, value_dim, **dd)
        self.reprojection = nn.Linear(value_dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, dim]`."""
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, H, W, {self.dim}]")
        tokens = x.flatten(1, 2)
        key, query, value = (
            layer(tokens).unflatten(-1, (self.num_heads, -1)) for layer in (self.keys, self.queries, self.values)
        )  # [B, N, heads, d]
        out = linear_attention(query.softmax(-1), key.softmax(1), value, impl=self.impl)
        return self.proj_drop(self.reprojection(out.flatten(2))).view(x.shape)

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention for one map of this size: the contexts, and what is read of them."""
        return 2 * shape[0] * shape[1] * self.key_dim * self.value_dim // self.num_heads

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("TorchScript cannot compile EfficientAttention2d; use torch.export or torch.compile")
