"""What agent attention costs: FLOPs and compulsory bytes of the fused passes, exact, on Python integers."""

from math import prod

from torch import Tensor


def forward_flops(*, batch: int, heads: int, head_dim: int, queries: int, keys: int, agents: int) -> int:
    """FLOPs of the forward pass: two products of 2 * head_dim for every pair of a token and an agent.

    Args:
        batch, heads: batch entries and heads.
        head_dim: features of a head.
        queries, keys, agents: how many of each a head has.
    """
    return 4 * batch * heads * head_dim * agents * (queries + keys)


def backward_flops(*, batch: int, heads: int, head_dim: int, queries: int, keys: int, agents: int) -> int:
    """FLOPs of the backward pass: five products a pair (logits again, dP, dQ, dK, dV); see `forward_flops`."""
    return 10 * batch * heads * head_dim * agents * (queries + keys)


def _operand_bytes(batch, heads, head_dim, queries, keys, agents, itemsize, bias_itemsizes) -> tuple[int, ...]:
    query, key, agent = (batch * heads * head_dim * tokens * itemsize for tokens in (queries, keys, agents))
    biases = heads * agents * (keys * bias_itemsizes[0] + queries * bias_itemsizes[1])
    lse = 4 * batch * heads * (queries + agents)
    return query, key, agent, biases, lse


def forward_bytes(
    *, batch: int, heads: int, head_dim: int, queries: int, keys: int, agents: int, itemsize: int,
    bias_itemsizes: tuple[int, int] = (0, 0),
) -> int:  # fmt: skip
    """Bytes that the forward pass must move: operands read once (agents twice), outputs and log-sum-exps written once.

    Args:
        batch, heads, head_dim, queries, keys, agents: as in `forward_flops`.
        itemsize: bytes of one element of query, key, value and agent.
        bias_itemsizes: bytes of one element of agent_bias and query_bias, 0 for one that is not there.
    """
    query, key, agent, biases, lse = _operand_bytes(
        batch, heads, head_dim, queries, keys, agents, itemsize, bias_itemsizes
    )
    return 2 * query + 2 * key + 4 * agent + biases + lse


def backward_bytes(
    *, batch: int, heads: int, head_dim: int, queries: int, keys: int, agents: int, itemsize: int,
    bias_itemsizes: tuple[int, int] = (0, 0),
) -> int:  # fmt: skip
    """Bytes that the backward pass must move: what the forward pass saved and the gradient of the output read once,
    all gradients written once; see `forward_bytes`."""
    query, key, agent, biases, lse = _operand_bytes(
        batch, heads, head_dim, queries, keys, agents, itemsize, bias_itemsizes
    )
    return 4 * query + 4 * key + 9 * agent + 2 * biases + lse


def summarize(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    impl: str | None,
    agent: Tensor,
    agent_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    scale: float | None = None,
    query_scale: float | None = None,
) -> dict[str, int | float | str]:
    """The cost of one call, by name, for `foveal.kernels.ops.explain`; arguments as in `agent_attention`."""
    batch, agents, heads, head_dim = agent.shape
    queries, keys = prod(query.shape[1:-2]), prod(key.shape[1:-2])
    sizes = dict(batch=batch, heads=heads, head_dim=head_dim, queries=queries, keys=keys, agents=agents)
    first, second = (0 if bias is None else bias.itemsize for bias in (agent_bias, query_bias))
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
