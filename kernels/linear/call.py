"""One call of linear attention: checked arguments, and the operators of torch's dispatcher that take them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..common.calling import check_tokens
from ..common.operator import Operator
from . import cost

MAX_HEAD_DIM = 128  # of keys and of values in the kernels: a program holds the whole state


@dataclass(frozen=True)
class LinearCall:
    """Everything but query, key and value; see `api.linear_attention`. `centered` comes with `mean`.

    The factor on the sum is `scale`, times `scales [heads]` where it differs between heads.
    """

    scales: Tensor | None = None
    scale: float = 1.0
    relu: bool = False
    mean: bool = False
    centered: bool = False
    eps: float | None = None
    floor: float | None = None

    @property
    def has_normaliser(self) -> bool:
        return self.eps is not None or self.floor is not None

    def factor(self, dtype: torch.dtype) -> float | Tensor:
        """Factor on the state: a number, or `[heads, 1, 1]` in `dtype`."""
        return self.scale if self.scales is None else self.scales.to(dtype)[:, None, None] * self.scale

    def bounded(self, sums: Tensor) -> Tensor:
        """The normaliser, of products of queries and the sum of keys."""
        return sums.clamp(min=self.floor) if self.eps is None else sums + self.eps


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    relu: bool = False,
    mean: bool = False,
    centered: bool = False,
    eps: float | None = None,
    floor: float | None = None,
    scale: float | Tensor = 1.0,
) -> LinearCall:
    """The call of arguments that fit together.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
    """
    check_tokens(query=query, key=key, value=value)
    if centered and not (eps is None and floor is None):
        raise ValueError(f"centered=True has no normaliser: eps={eps} and floor={floor} must be None")
    if eps is not None and floor is not None:
        raise ValueError(f"eps={eps} and floor={floor} exclude each other: one of them must be None")
    if eps is not None and not eps >= 0:
        raise ValueError(f"eps={eps} must be None or at least 0")
    if floor is not None and not floor > 0:
        raise ValueError(f"floor={floor} must be None or above 0")
    if isinstance(scale, Tensor):
        if scale.shape != query.shape[-2:-1]:
            raise ValueError(f"scale.shape={tuple(scale.shape)} must be [heads] = {tuple(query.shape[-2:-1])}")
        return LinearCall(scale, 1.0, relu, mean or centered, centered, eps, floor)
    number = scale if isinstance(scale, torch.SymFloat) else float(scale)
    return LinearCall(None, number, relu, mean or centered, centered, eps, floor)


def _out_and_state(query: Tensor, key: Tensor, value: Tensor, call: LinearCall) -> tuple[Tensor, Tensor]:
    """Empty output, and the packed state `[B, heads, d * e + d + e]` that the backward pass reads."""
    (d, e), accumulate = (query.shape[-1], value.shape[-1]), torch.promote_types(query.dtype, torch.float32)
    state = query.new_empty(query.shape[0], query.shape[-2], d * e + d + e, dtype=accumulate)
    return query.new_empty(*query.shape[:-1], e), state


def _flops(query: Tensor, key: Tensor, value: Tensor, call: LinearCall) -> tuple[int, int]:
    (batch, *shape, heads, head_dim), value_dim = query.shape, value.shape[-1]
    sizes = dict(batch=batch, heads=heads, head_dim=head_dim, value_dim=value_dim)
    sizes |= dict(queries=prod(shape), keys=prod(key.shape[1:-2]))
    return cost.forward_flops(**sizes), cost.backward_flops(**sizes)


linear = Operator(
    "linear",
    package=__name__.rpartition(".")[0],
    call=LinearCall,
    differentiable=("scales",),
    flops=_flops,
    summarize=cost.summarize,
    fake=_out_and_state,
    flows=(True, False),
    modules={"triton": "launch", "torch": "chunked", "reference": "reference"},
    max_head_dims=(MAX_HEAD_DIM, None),  # `api` gives the kernels a part of longer values at a time
    graph="torch",
    title="linear attention",
)
