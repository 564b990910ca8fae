"""One call of attention with a bias of low rank: checked arguments; PyTorch's fused attention computes it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor

from ..common.operator import Operator


@dataclass(frozen=True)
class LowRankCall:
    """Everything but query, key and value; see `api.biased_attention`."""

    query_factor: Tensor
    key_factor: Tensor
    scale: float | None = None


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_factor: Tensor,
    key_factor: Tensor,
    scale: float | None = None,
) -> LowRankCall:
    """The call of arguments that fit together; factors are checked by `widened.widen`.

    Raises:
        ValueError: an argument outside what is accepted; the message names it and its value.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected [B, *spatial, heads, head_dim]")
    if len({query.dtype, key.dtype, value.dtype}) > 1:
        raise ValueError(f"query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}")
    if value.shape[:-1] != key.shape[:-1] or query.shape[0] != key.shape[0] or query.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"key of {tuple(key.shape)} and value of {tuple(value.shape)} must have one shape in all but head_dim, and "
            f"the batch and heads of query.shape={tuple(query.shape)}"
        )
    return LowRankCall(query_factor, key_factor, scale)


def _flops(query: Tensor, key: Tensor, value: Tensor, call: LowRankCall) -> tuple[int, int]:
    pairs = prod(query.shape[:-1]) * prod(key.shape[1:-2])
    features = query.shape[-1] + call.query_factor.shape[-1]
    return 2 * pairs * (features + value.shape[-1]), 2 * pairs * (3 * features + 2 * value.shape[-1])


def _summarize(query: Tensor, key: Tensor, value: Tensor, call: LowRankCall, impl: str | None) -> dict:
    """The cost of one call, by name, for `foveal.kernels.ops.explain`."""
    flops, rank, heads = _flops(query, key, value, call), call.query_factor.shape[-1], query.shape[-2]
    queries, keys = prod(query.shape[1:-2]), prod(key.shape[1:-2])
    factors = sum(x.numel() * x.itemsize for x in (call.query_factor, call.key_factor))
    rows = query.shape[0] * heads * (queries + keys) * (query.shape[-1] + value.shape[-1]) * query.itemsize
    return {
        "rank": rank,
        "forward_flops": flops[0],
        "backward_flops": flops[1],
        "forward_bytes": rows + factors,
        "backward_bytes": 2 * (rows + factors),
        "bias_bytes": heads * queries * keys * query.itemsize,  # of the bias that is not formed
    }


low_rank = Operator(
    "low_rank",
    package=__name__.rpartition(".")[0],
    call=LowRankCall,
    differentiable=("query_factor", "key_factor"),
    flops=_flops,
    summarize=_summarize,
    modules={"torch": "widened"},
    title="attention with a bias of low rank",
)
