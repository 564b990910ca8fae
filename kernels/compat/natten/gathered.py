"""Attention weights of neighborhoods as tensors: logits of gathered keys, and sums of values that weights multiply.

With `keys[t, o]` the o-th key of query t there are three sums,

    logits   [t, o] = query[t] . key[keys[t, o]]
    weighted [t]    = sum over o of weights[t, o] value[keys[t, o]]
    spread   [k]    = sum over (t, o) with keys[t, o] = k of weights[t, o] x[t]

and the gradients of each are the other two, so all can be differentiated any number of times. `spread` reads from a
list of the queries of every key and adds in its order: nothing is added atomically. Graphs of `torch.compile`, which
take no function with a forward derivative, have PyTorch's own gradients instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...common.calling import tracing
from ...neighborhood.geometry import Axis, axis_bounds, group_length, inverse_bounds, window_bounds

MOST_NUMBERS = 1 << 23  # gathered at a time: 32 MiB in float32


class Neighbors(NamedTuple):
    """Who sees whom on a flattened grid of T tokens with windows of O keys.

    Attributes:
        keys: int64 `[T, O]`, the keys of each query, in C order of the window; any token where not visible.
        visible: bool `[T, O]`; a causal window has fewer keys than slots.
        offsets: int64 `[T, O]`, index of each pair in a flattened table of relative positions.
        queries: int64 `[T, M]`, the queries that see each key; any token past the last one.
        slots: int64 `[T, M]`, the slot that the key has in the window of each of these queries.
        listed: bool `[T, M]`, which of these exist.
    """

    keys: Tensor
    visible: Tensor
    offsets: Tensor
    queries: Tensor
    slots: Tensor
    listed: Tensor


def _along(axis: Axis, device: torch.device) -> Neighbors:
    """The neighbors along one axis."""
    window, dilation = axis.window, axis.dilation
    token = torch.arange(axis.length, device=device)
    group, place = token % dilation, token // dilation
    count = group_length(axis.length, dilation, group)
    first, last = (x[:, None] for x in axis_bounds(axis, device))
    keys = first + torch.arange(window, device=device) * dilation
    visible = keys <= last
    keys = torch.minimum(keys, last)
    offsets = (keys // dilation - place[:, None] + window - 1).clamp(0, 2 * window - 2)

    rest = axis.window, axis.stride, axis.causal
    ends = (inverse_bounds(k // dilation, group_length(axis.length, dilation, k % dilation), *rest)
            for k in range(axis.length))  # fmt: skip
    most = max(end - start for start, end in ends)
    start, end = (x[:, None] for x in inverse_bounds(place, count, *rest))
    query = start + torch.arange(most, device=device)
    listed = query < end
    query = torch.minimum(query, end - 1)
    lowest, _ = window_bounds(query, count[:, None], *rest)
    return Neighbors(keys, visible, offsets, query * dilation + group[:, None], place[:, None] - lowest, listed)


def _product(axes: tuple[Axis, ...], device: torch.device) -> Neighbors:
    def join(outer: Tensor, inner: Tensor, size: int) -> Tensor:
        pairs = outer[:, None, :, None] * size + inner[None, :, None, :]
        return pairs.flatten(2).flatten(0, 1)

    def both(outer: Tensor, inner: Tensor) -> Tensor:
        return (outer[:, None, :, None] & inner[None, :, None, :]).flatten(2).flatten(0, 1)

    found = _along(axes[0], device)
    for axis in axes[1:]:
        more = _along(axis, device)
        found = Neighbors(
            join(found.keys, more.keys, axis.length),
            both(found.visible, more.visible),
            join(found.offsets, more.offsets, 2 * axis.window - 1),
            join(found.queries, more.queries, axis.length),
            join(found.slots, more.slots, axis.window),
            both(found.listed, more.listed),
        )
    return found


_kept = lru_cache(maxsize=16)(_product)


def neighbors(axes: tuple[Axis, ...], device: torch.device) -> Neighbors:
    """The neighbors on a grid; kept for the next call with the same grid."""
    return _product(axes, device) if tracing() else _kept(axes, device)


def _chunks(x: Tensor, width: int) -> Iterator[slice]:
    """Slices of `width` columns whose gathered tokens `[N, T, columns, d]` stay small."""
    columns = max(1, MOST_NUMBERS // max(x.numel(), 1))
    return (slice(first, min(first + columns, width)) for first in range(0, width, columns))


def _gather(x: Tensor, tokens: Tensor) -> Tensor:
    """`x [N, T, d]` at `tokens [T, columns]`: `[N, T, columns, d]`."""
    return x.index_select(1, tokens.flatten()).unflatten(1, tokens.shape)


def _dot(query: Tensor, key: Tensor, near: Neighbors) -> Tensor:
    out = [
        (_gather(key, near.keys[:, columns]) @ query[..., None])[..., 0] for columns in _chunks(key, near.keys.shape[1])
    ]
    return torch.cat(out, -1).masked_fill(~near.visible, 0)


def _sum(weights: Tensor, x: Tensor, tokens: Tensor) -> Tensor:
    """Sum over columns of `weights [N, T, columns]` times `x [N, T, d]` at `tokens [T, columns]`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(x.shape, dtype=dtype)
    for columns in _chunks(x, tokens.shape[1]):
        total += (weights[..., None, columns] @ _gather(x, tokens[:, columns]))[..., 0, :]
    return total.to(x.dtype)


def _mix(weights: Tensor, value: Tensor, near: Neighbors) -> Tensor:
    return _sum(weights.masked_fill(~near.visible, 0), value, near.keys)


class _Product(torch.autograd.Function):
    """A sum of products of two tensors, linear in each."""

    @staticmethod
    def keep(ctx: Any, first: Tensor, second: Tensor, near: Neighbors) -> None:
        """Keep the two tensors for derivatives of either mode."""
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)
        ctx.near = near

    @classmethod
    def tangent(cls, ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Derivative along tangents of the two tensors."""
        first, second = ctx.saved_tensors
        parts = [cls.apply(x, second, ctx.near) for x in tangents[:1] if x is not None]
        parts += [cls.apply(first, x, ctx.near) for x in tangents[1:2] if x is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class _Logits(_Product):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, near: Neighbors) -> Tensor:
        _Product.keep(ctx, query, key, near)
        return _dot(query, key, near)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _Logits.tangent(ctx, *tangents)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        query, key = ctx.saved_tensors
        return _Weighted.apply(grads[0], key, ctx.near), _Spread.apply(grads[0], query, ctx.near), None


class _Weighted(_Product):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, value: Tensor, near: Neighbors) -> Tensor:
        _Product.keep(ctx, weights, value, near)
        return _mix(weights, value, near)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _Weighted.tangent(ctx, *tangents)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        weights, value = ctx.saved_tensors
        return _Logits.apply(grads[0], value, ctx.near), _Spread.apply(weights, grads[0], ctx.near), None


class _Spread(_Product):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, x: Tensor, near: Neighbors) -> Tensor:
        _Product.keep(ctx, weights, x, near)
        place = (near.queries * weights.shape[-1] + near.slots).flatten()
        of_queries = weights.flatten(1).index_select(1, place).unflatten(1, near.queries.shape)
        return _sum(of_queries.masked_fill(~near.listed, 0), x, near.queries)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _Spread.tangent(ctx, *tangents)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        weights, x = ctx.saved_tensors
        return _Logits.apply(x, grads[0], ctx.near), _Weighted.apply(weights, grads[0], ctx.near), None


def _flat(x: Tensor) -> Tensor:
    """`[B, heads, *spatial, d]` as `[B * heads, T, d]`."""
    return x.flatten(0, 1).flatten(1, -2)


def logits(query: Tensor, key: Tensor, axes: tuple[Axis, ...], bias: Tensor | None = None) -> Tensor:
    """Products of every query with the keys of its window.

    Args:
        query, key: `[B, heads, *spatial, head_dim]`.
        axes: the grid.
        bias: None, or a table `[heads, *(2 * window - 1)]` of relative positions, which is added.

    Returns:
        `[B, heads, *spatial, prod(window)]`, keys in C order of the window; -inf in slots that a causal window lacks.
    """
    near = neighbors(axes, query.device)
    found = (_dot if torch.compiler.is_compiling() else _Logits.apply)(_flat(query), _flat(key), near)
    found = found.unflatten(0, query.shape[:2])
    if bias is not None:
        found = found + bias.to(found.dtype).flatten(1)[:, near.offsets]
    if any(axis.causal for axis in axes):
        found = found.masked_fill(~near.visible, -torch.inf)
    return found.unflatten(2, query.shape[2:-1])


def weighted(weights: Tensor, value: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Sums of the values of every window, multiplied by weights.

    Args:
        weights: `[B, heads, *spatial, prod(window)]`; what stands in slots that a causal window lacks is not used.
        value: `[B, heads, *spatial, value_dim]`.
        axes: the grid.

    Returns:
        `[B, heads, *spatial, value_dim]`.
    """
    near = neighbors(axes, value.device)
    found = (_mix if torch.compiler.is_compiling() else _Weighted.apply)(_flat(weights), _flat(value), near)
    return found.unflatten(0, value.shape[:2]).unflatten(2, value.shape[2:-1])


def count(axes: tuple[Axis, ...]) -> int:
    """Keys in a window."""
    return prod([axis.window for axis in axes])
