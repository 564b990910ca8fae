"""Public agent attention: validation and semantics."""

from math import prod

from torch import Tensor

from ..common.arguments import operator
from ..common.calling import Impl, choose, obstacles, resolve_scale, without_autocast
from . import library, reference, tiled

__all__ = ["agent_attention", "choose", "obstacles"]


def _check_tokens(query: Tensor, key: Tensor, value: Tensor, agent: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value), ("agent", agent)):
        if x.dim() < 4 or (name == "agent" and x.dim() != 4):
            expected = "[B, agents, heads, head_dim]" if name == "agent" else "[B, *spatial, heads, head_dim]"
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {expected}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name}.dtype={x.dtype} must equal query.dtype={query.dtype}")
        own, alike = (-1, "heads") if name == "value" else (None, "heads and head_dim")
        if x.shape[0] != query.shape[0] or x.shape[-2:own] != query.shape[-2:own]:
            raise ValueError(
                f"{name}.shape={tuple(x.shape)} must have the batch, {alike} of query.shape={tuple(query.shape)}"
            )
        if any(n < 1 for n in x.shape[1:]):
            raise ValueError(f"{name}.shape={tuple(x.shape)} must have no empty axis but the batch")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"value.shape={tuple(value.shape)} must equal key.shape={tuple(key.shape)} in all but head_dim"
        )


def _check_bias(name: str, bias: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if bias is not None and tuple(bias.shape) != shape:
        raise ValueError(f"{name}.shape={tuple(bias.shape)} must be {meaning} = {shape}")


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
    _check_tokens(query, key, value, agent)
    heads, agents = agent.shape[2], agent.shape[1]
    queries, keys = prod(query.shape[1:-2]), prod(key.shape[1:-2])
    _check_bias("agent_bias", agent_bias, (heads, agents, keys), "[heads, agents, keys]")
    _check_bias("query_bias", query_bias, (heads, queries, agents), "[heads, queries, agents]")
    key_scale = resolve_scale(query, scale)
    attend = {"triton": library.attend, "torch": tiled.attend, "reference": reference.attend}[
        choose(query, impl, value)
    ]
    with without_autocast(query.device):
        return attend(
            query,
            key,
            value,
            agent,
            agent_bias=agent_bias,
            query_bias=query_bias,
            scale=key_scale,
            query_scale=key_scale if query_scale is None else float(query_scale),
        )
