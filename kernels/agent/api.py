"""Public agent attention: validation and semantics."""

from math import prod

from torch import Tensor

from ..calling import Impl, choose, obstacles, resolve_scale, without_autocast
from . import library, reference, tiled

__all__ = ["agent_attention", "choose", "obstacles"]


def _check_tokens(query: Tensor, key: Tensor, value: Tensor, agent: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value), ("agent", agent)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() < 4 or (name == "agent" and x.dim() != 4):
            expected = "[B, agents, heads, head_dim]" if name == "agent" else "[B, *spatial, heads, head_dim]"
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {expected}")
        if x.dtype != query.dtype or not x.dtype.is_floating_point:
            raise TypeError(f"{name}.dtype={x.dtype} must be a floating dtype and equal query.dtype={query.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name}.device={x.device} must equal query.device={query.device}")
        if x.shape[0] != query.shape[0] or x.shape[-2:] != query.shape[-2:]:
            raise ValueError(
                f"{name}.shape={tuple(x.shape)} must have the batch, heads and head_dim of "
                f"query.shape={tuple(query.shape)}"
            )
        if any(n < 1 for n in x.shape[1:]):
            raise ValueError(f"{name}.shape={tuple(x.shape)} must have no empty axis but the batch")
    if key.shape != value.shape:
        raise ValueError(f"value.shape={tuple(value.shape)} must equal key.shape={tuple(key.shape)}")


def _check_bias(name: str, bias: Tensor | None, query: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(bias).__name__}")
    if tuple(bias.shape) != shape:
        raise ValueError(f"{name}.shape={tuple(bias.shape)} must be {meaning} = {shape}")
    if not bias.dtype.is_floating_point or bias.device != query.device:
        raise ValueError(f"{name} ({bias.dtype}, {bias.device}) must be floating point on query.device={query.device}")


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
        key, value: `[B, *spatial, heads, head_dim]`, on a grid of their own.
        agent: `[B, agents, heads, head_dim]`; pooled queries in Agent Attention.
        agent_bias: `[heads, agents, keys]`, any floating dtype, added to the scaled logits of the agents; keys is the
            product of the spatial axes of key.
        query_bias: `[heads, queries, agents]`, added to the scaled logits of the queries.
        scale: factor on agent . key; head_dim ** -0.5 when None.
        query_scale: factor on query . agent; that of agent . key when None.
        impl: "auto" takes the fused kernels on CUDA and ROCm and plain PyTorch elsewhere; "triton", "tiled" or
            "reference" insist on one. `foveal.kernels.ops.explain` says which a call takes and why.

    Returns:
        the shape and dtype of query.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
        NotImplementedError: `impl` cannot take this call; the message says why.
    """
    _check_tokens(query, key, value, agent)
    heads, agents = agent.shape[2], agent.shape[1]
    queries, keys = prod(query.shape[1:-2]), prod(key.shape[1:-2])
    _check_bias("agent_bias", agent_bias, query, (heads, agents, keys), "[heads, agents, keys]")
    _check_bias("query_bias", query_bias, query, (heads, queries, agents), "[heads, queries, agents]")
    key_scale = resolve_scale(query, scale)
    attend = {"triton": library.attend, "tiled": tiled.attend, "reference": reference.attend}[choose(query, impl)]
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
