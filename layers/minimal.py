"""Attention with fewer projections: queries and keys of one matrix or none, values that are not projected."""

from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

QueryKey = Literal["separate", "collapsed", "symmetric"]
ValueOutput = Literal["separate", "merged", "none"]


class MinimalAttention(nn.Module):
    """Attention of all tokens of `[B, N, dim]`, each of whose projections may be left out (arXiv:2410.13732).

    Heads whose keys or values are not projected take their slice of the channels. The single-head form of "collapsed"
    is the paper's: scores are x W x' for one matrix W; for several heads, which the paper does not treat, a head's
    queries are x W_i against its slice as keys.

    Args:
        dim: channels of the input and the output.
        num_heads: heads; a divisor of dim.
        qk: "separate" projections, "collapsed" into one of the queries, or "symmetric": one projection for both.
        vo: "separate" projections of values and output, "merged" into one of the output, or "none".
        proj_drop: dropout of the output.

    Raises:
        ValueError: another form; num_heads does not divide dim; `forward` gets another shape.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        qk: QueryKey = "separate",
        vo: ValueOutput = "separate",
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        if qk not in get_args(QueryKey):
            raise ValueError(f"qk={qk!r} must be one of {get_args(QueryKey)}")
        if vo not in get_args(ValueOutput):
            raise ValueError(f"vo={vo!r} must be one of {get_args(ValueOutput)}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.qk, self.vo = dim, num_heads, qk, vo
        self.q = nn.Linear(dim, dim, bias=qk == "separate", **dd)
        self.k = nn.Linear(dim, dim, **dd) if qk == "separate" else None
        self.v = nn.Linear(dim, dim, **dd) if vo == "separate" else None
        self.proj = nn.Linear(dim, dim, **dd) if vo != "none" else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of `[B, N, dim]`, each `[B, heads, N, d]`."""
        query = self.q(x)
        key = query if self.qk == "symmetric" else x if self.k is None else self.k(x)
        return self._heads(query), self._heads(key)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, dim]` to `[B, N, dim]`."""
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, N, {self.dim}]")
        query, key = self.scores(x)
        value = self._heads(x if self.v is None else self.v(x))
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out))

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention for one sequence; `shape` is tokens and dim."""
        return 2 * shape[0] ** 2 * self.dim

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, qk={self.qk!r}, vo={self.vo!r}"

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("TorchScript cannot compile MinimalAttention; use torch.export or torch.compile")
