"""Public agent attention: validation and semantics."""

from torch import Tensor

from ..common.arguments import operator
from ..common.calling import Impl
from .call import agent_operator, make_call


@agent_operator.public(make_call)
@operator
def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent: Tensor,
    *,
    agent_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    scale: float | None = None,
    query_scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention through agent tokens (arXiv:2312.08874, equation 4): linear in the number of tokens.

    Agents gather from all keys, then every query gathers from the agents:

        agent_value = softmax(scale * agent @ key.T + agent_bias) @ value
        out = softmax(query_scale * query @ agent.T + query_bias) @ agent_value

    Differentiable in every tensor argument. Spatial axes are flattened in C order; queries and keys may lie on
    different grids, or on none: `[B, N, heads, head_dim]` also has room for class tokens.

    Args:
        query: `[B, *spatial, heads, head_dim]`, float16, bfloat16, float32 or float64, one spatial axis or more, any
            strides.
        key: `[B, *key_spatial, heads, head_dim]`, on a grid of its own.
        value: `[B, *key_spatial, heads, value_dim]`.
        agent: `[B, agents, heads, head_dim]`; pooled queries in Agent Attention.
        agent_bias: `[heads, agents, keys]`, any of these dtypes, added to the scaled logits of the agents; keys is the
            product of the spatial axes of key.
        query_bias: `[heads, queries, agents]`, added to the scaled logits of the queries.
        scale: factor on agent . key; head_dim ** -0.5 when None.
        query_scale: factor on query . agent; that of agent . key when None.
        impl: "auto" takes the fused kernels on CUDA and ROCm and plain PyTorch elsewhere; "triton", "torch" or
            "reference" insist on one. `foveal.kernels.ops.explain` says which a call takes and why.

    Returns:
        `[B, *spatial, heads, value_dim]` in the dtype of query.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
        NotImplementedError: `impl` cannot take this call; the message says why.
    """
    biases = {"agent_bias": agent_bias, "query_bias": query_bias}
    call = make_call(query, key, value, agent=agent, **biases, scale=scale, query_scale=query_scale)
    return agent_operator(query, key, value, call, impl=impl)
