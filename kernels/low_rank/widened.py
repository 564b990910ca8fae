"""Attention with a bias of thin factors, by any attention without one: the factors become features of the heads."""

from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .call import LowRankCall

MULTIPLE = 8  # of the head dim, which fused attention asks for


def _grid_factor(name: str, factor: Tensor, x: Tensor) -> Tensor:
    """A factor `[heads, tokens, rank]` laid out as `x [B, *spatial, heads, head_dim]`."""
    heads, tokens = x.shape[-2], prod(x.shape[1:-2])
    if factor.dim() != 3 or factor.shape[0] not in (1, heads) or factor.shape[1] != tokens:
        raise ValueError(f"{name}.shape={tuple(factor.shape)} must be [heads={heads} or 1, tokens={tokens}, rank]")
    if not factor.dtype.is_floating_point or factor.device != x.device:
        raise ValueError(f"{name} ({factor.dtype}, {factor.device}) must be floating point on the device {x.device}")
    grid = factor.transpose(0, 1).expand(-1, heads, -1).reshape(*x.shape[1:-1], factor.shape[-1])
    return grid.expand(x.shape[0], *grid.shape)


def _columns(query_factor: Tensor, key_factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors in `dtype` with the same product, but for rounding.

    Factors of higher precision than half become a rounded part and the rest of it: three products of parts keep twice
    the bits, without which the positions of a long sequence would all round to their neighbours.
    """
    if dtype.itemsize > 2 or max(query_factor.dtype.itemsize, key_factor.dtype.itemsize) <= 2:
        return query_factor.to(dtype), key_factor.to(dtype)
    q_high, k_high = query_factor.to(dtype), key_factor.to(dtype)
    q_low, k_low = (query_factor - q_high).to(dtype), (key_factor - k_high).to(dtype)
    return torch.cat([q_high, q_high, q_low], -1), torch.cat([k_high, k_low, k_high], -1)


def pad_head_dim(x: Tensor, head_dim: int) -> Tensor:
    """`x [..., d]` with zeros up to `head_dim`; crop what attention makes of a padded value back to `[..., :d]`.

    Raises:
        ValueError: head_dim < d.
    """
    if head_dim < x.shape[-1]:
        raise ValueError(f"head_dim={head_dim} must be at least that of x.shape={tuple(x.shape)}")
    return pad(x, (0, head_dim - x.shape[-1]))


def widen(
    query: Tensor, key: Tensor, query_factor: Tensor, key_factor: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Query and key whose plain products are biased logits (arXiv:2505.12044, equation 4).

    With widened operands any attention with `scale=1` computes that of the given ones with the bias
    `query_factor @ key_factor.T`:

        logits = scale * query @ key.T + query_factor @ key_factor.T = widened_query @ widened_key.T

    Differentiable in all tensors.

    Args:
        query, key: `[B, *spatial, heads, head_dim]`, each on a grid of its own.
        query_factor: `[heads or 1, queries, rank]`, with queries in the C order of their grid; any floating dtype,
            cast to that of query. To half precision factors of float32 are cast in two parts, three columns for one.
        key_factor: `[heads or 1, keys, rank]`.
        scale: factor on query . key; head_dim ** -0.5 when None. It does not scale the bias.

    Returns:
        query and key `[B, *spatial, heads, D]` with D the next multiple of 8 from head_dim + columns on.

    Raises:
        ValueError: shapes, ranks or devices that do not fit together.
    """
    if query.dim() < 4 or key.dim() < 4 or query.shape[-1] != key.shape[-1]:
        shapes = f"{tuple(query.shape)} and {tuple(key.shape)}"
        raise ValueError(f"query and key of {shapes} must be [B, *spatial, heads, head_dim] of equal head_dim")
    if query_factor.shape[-1:] != key_factor.shape[-1:]:
        raise ValueError(
            f"key_factor.shape={tuple(key_factor.shape)} must have the rank of query_factor.shape="
            f"{tuple(query_factor.shape)}"
        )
    head_dim = query.shape[-1]
    query_grid = _grid_factor("query_factor", query_factor, query)
    query_grid, key_grid = _columns(query_grid, _grid_factor("key_factor", key_factor, key), query.dtype)
    width = -(-(head_dim + query_grid.shape[-1]) // MULTIPLE) * MULTIPLE
    query = query * (head_dim**-0.5 if scale is None else float(scale))
    wide_query, wide_key = torch.cat([query, query_grid], dim=-1), torch.cat([key, key_grid], dim=-1)
    return pad_head_dim(wide_query, width), pad_head_dim(wide_key, width)


def attend(query: Tensor, key: Tensor, value: Tensor, call: LowRankCall) -> Tensor:
    """Output `[B, *spatial, heads, value_dim]` by PyTorch's fused attention over widened heads."""
    wide_query, wide_key = widen(query, key, call.query_factor, call.key_factor, scale=call.scale)
    width = max(wide_key.shape[-1], -(-value.shape[-1] // MULTIPLE) * MULTIPLE)  # fused attention wants one
    widened = (pad_head_dim(x, width) for x in (wide_query, wide_key, value))
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in widened)
    out = scaled_dot_product_attention(q, k, v, scale=1.0)
    return out[..., : value.shape[-1]].transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1])
