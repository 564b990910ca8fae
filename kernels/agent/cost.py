"""Cost of agent attention: FLOPs and compulsory bytes of the fused passes, exact, on Python integers."""

from math import prod
from typing import Any

from torch import Tensor


def forward_flops(
    *, batch: int, heads: int, head_dim: int, queries: int, keys: int, agents: int, value_dim: int | None = None
) -> int:  # fmt: skip
    """FLOPs of the forward pass: two products for every pair of a token and an agent.

    Args:
        batch, heads: batch entries and heads.
        head_dim: features of a head of query, key and agent.
        queries, keys, agents: how many of each a head has.
        value_dim: features of a head of value; head_dim when None.
    """
    return 2 * batch * heads * (head_dim + (value_dim or head_dim)) * agents * (queries + keys)


def backward_flops(
    *, batch: int, heads: int, head_dim: int, queries: int, keys: int, agents: int, value_dim: int | None = None
) -> int:  # fmt: skip
    """FLOPs of the backward pass: five products a pair (logits again, dP, dQ, dK, dV); see `forward_flops`."""
    return 2 * batch * heads * (3 * head_dim + 2 * (value_dim or head_dim)) * agents * (queries + keys)


def _operand_bytes(
    batch, heads, head_dim, value_dim, queries, keys, agents, itemsize, bias_itemsizes
) -> tuple[int, int, int, int, int, int]:
    """Bytes of queries with their outputs, keys with their values, agents, values of the agents, biases and
    log-sum-exps."""
    row, value_row = (batch * heads * features * itemsize for features in (head_dim, value_dim or head_dim))
    biases = heads * agents * (keys * bias_itemsizes[0] + queries * bias_itemsizes[1])
    lse = 4 * batch * heads * (queries + agents)
    return queries * (row + value_row), keys * (row + value_row), agents * row, agents * value_row, biases, lse


def forward_bytes(
    *, batch: int, heads: int, head_dim: int, queries: int, keys: int, agents: int, itemsize: int,
    bias_itemsizes: tuple[int, int] = (0, 0), value_dim: int | None = None,
) -> int:  # fmt: skip
    """Bytes that the forward pass must move: operands read once (agents twice), outputs and log-sum-exps written once.

    Args:
        batch, heads, head_dim, queries, keys, agents, value_dim: as in `forward_flops`.
        itemsize: bytes of one element of query, key, value and agent.
        bias_itemsizes: bytes of one element of agent_bias and query_bias, 0 for one that is not there.
    """
    query, key, agent, gathered, biases, lse = _operand_bytes(
        batch, heads, head_dim, value_dim, queries, keys, agents, itemsize, bias_itemsizes
    )
    return query + key + 2 * agent + 2 * gathered + biases + lse


def backward_bytes(
    *, batch: int, heads: int, head_dim: int, queries: int, keys: int, agents: int, itemsize: int,
    bias_itemsizes: tuple[int, int] = (0, 0), value_dim: int | None = None,
) -> int:  # fmt: skip
    """Bytes that the backward pass must move: what the forward pass saved and the gradient of the output read once,
    all gradients written once; see `forward_bytes`."""
    query, key, agent, gathered, biases, lse = _operand_bytes(
        batch, heads, head_dim, value_dim, queries, keys, agents, itemsize, bias_itemsizes
    )
    return 2 * query + 2 * key + 5 * agent + 4 * gathered + 2 * biases + lse


def summarize(query: Tensor, key: Tensor, value: Tensor, call: Any, impl: str | None) -> dict[str, int | float | str]:
    """The cost of one call, by name, for `foveal.kernels.ops.explain`."""
    batch, agents, heads, head_dim = call.agent.shape
    queries, keys = prod(query.shape[1:-2]), prod(key.shape[1:-2])
    sizes = dict(batch=batch, heads=heads, head_dim=head_dim, queries=queries, keys=keys, agents=agents)
    sizes["value_dim"] = value.shape[-1]
    first, second = (0 if bias is None else bias.itemsize for bias in (call.agent_bias, call.query_bias))
    return {
        "queries": queries,
        "keys": keys,
        "agents": agents,
        "dense_over_useful": round(queries * keys / (agents * (queries + keys)), 2),
        "forward_flops": forward_flops(**sizes),
        "backward_flops": backward_flops(**sizes),
        "forward_bytes": forward_bytes(**sizes, itemsize=query.itemsize, bias_itemsizes=(first, second)),
        "backward_bytes": backward_bytes(**sizes, itemsize=query.itemsize, bias_itemsizes=(first, second)),
    }
