"""One call of agent attention: checked arguments, and the operators of torch's dispatcher that take them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..common.calling import check_tokens, resolve_scale
from ..common.operator import Operator
from . import cost


@dataclass(frozen=True)
class AgentCall:
    """Everything but query, key and value; see `api.agent_attention`."""

    agent: Tensor
    agent_bias: Tensor | None
    query_bias: Tensor | None
    scale: float
    query_scale: float


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    agent: Tensor,
    agent_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    scale: float | None = None,
    query_scale: float | None = None,
) -> AgentCall:
    """The call of arguments that fit together.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
    """
    if agent.dim() != 4:
        raise ValueError(f"agent has shape {tuple(agent.shape)}; expected [B, agents, heads, head_dim]")
    check_tokens(query=query, key=key, value=value, agent=agent)
    heads, agents = agent.shape[2], agent.shape[1]
    queries, keys = prod(query.shape[1:-2]), prod(key.shape[1:-2])
    _check_bias("agent_bias", agent_bias, (heads, agents, keys), "[heads, agents, keys]")
    _check_bias("query_bias", query_bias, (heads, queries, agents), "[heads, queries, agents]")
    key_scale = resolve_scale(query, scale)
    return AgentCall(agent, agent_bias, query_bias, key_scale, key_scale if query_scale is None else float(query_scale))


def _check_bias(name: str, bias: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if bias is not None and tuple(bias.shape) != shape:
        raise ValueError(f"{name}.shape={tuple(bias.shape)} must be {meaning} = {shape}")


def _outputs(query: Tensor, key: Tensor, value: Tensor, call: AgentCall) -> tuple[Tensor, ...]:
    """Empty output, values of the agents, and base-2 log-sum-exps `[B, heads, tokens]` of agents and of queries."""
    (batch, *shape, heads, _), agents = query.shape, call.agent.shape[1]
    sums = (query.new_empty(batch, heads, count, dtype=torch.float32) for count in (agents, prod(shape)))
    return (
        query.new_empty(*query.shape[:-1], value.shape[-1]),
        value.new_empty(batch, agents, heads, value.shape[-1]),
        *sums,
    )


def _flops(query: Tensor, key: Tensor, value: Tensor, call: AgentCall) -> tuple[int, int]:
    (batch, *shape, heads, head_dim), agents = query.shape, call.agent.shape[1]
    sizes = dict(batch=batch, heads=heads, head_dim=head_dim, value_dim=value.shape[-1], agents=agents)
    sizes |= dict(queries=prod(shape), keys=prod(key.shape[1:-2]))
    return cost.forward_flops(**sizes), cost.backward_flops(**sizes)


agent_operator = Operator(
    "agent",
    package=__name__.rpartition(".")[0],
    call=AgentCall,
    differentiable=("agent", "agent_bias", "query_bias"),
    flops=_flops,
    summarize=cost.summarize,
    fake=_outputs,
    flows=(True, False, False, False),
    title="agent attention with impl='triton'",
)
