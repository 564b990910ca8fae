"""Attend to every group of equal sizes as one dense batch."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from .layout import Group, Order, RaggedLayout, find_groups, find_order

Attend = Callable[[Group, Tensor, Tensor, Tensor], tuple[Tensor, Any]]


class _Permute(torch.autograd.Function):
    """Rows in another order. The gradient gathers, too: `index_select` would add rows, one atomic addition each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grads[0], inverse, order), None, None


def _in_groups(x: Tensor, order: Order) -> Tensor:
    return x if order.tokens is None else _Permute.apply(x, order.tokens, order.inverse)


def _in_entries(x: Tensor, order: Order) -> Tensor:
    return x if order.tokens is None else _Permute.apply(x, order.inverse, order.tokens)


def attend_groups(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, layout: RaggedLayout, key_layout: RaggedLayout
) -> tuple[Tensor, Any]:
    """Output and log-sum-exp of packed tokens.

    Args:
        attend: `(group, query, key, value)` to output and log-sum-exp or None, on dense grids
            `[entries, *size, heads, d]`.
        query, key, value: `[tokens, heads, d]` each, entries one after the other.
        layout, key_layout: sizes of the entries of the queries and of the keys.

    Returns:
        output `[tokens, heads, value_dim]` and log-sum-exp `[tokens, heads]`, or None.
    """
    _check_entries(layout, key_layout)
    groups = find_groups(layout.sizes, key_layout.sizes)
    if not groups:
        out = query.new_zeros(*query.shape[:-1], value.shape[-1])
        return out, out.new_zeros(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))
    order = find_order(layout.sizes, groups, query.device)
    key_order = find_order(key_layout.sizes, groups, key.device)
    dense = [_in_groups(query, order), *(_in_groups(x, key_order) for x in (key, value))]
    outs, lses, starts = [], [], [0, 0, 0]
    for group in groups:
        taken = []
        for i, (x, size) in enumerate(zip(dense, (group.size, group.key_size, group.key_size), strict=True)):
            shape = len(group.members), *size
            taken.append(x.narrow(0, starts[i], prod(shape)).unflatten(0, shape))
            starts[i] += prod(shape)
        out, lse = attend(group, *taken)
        outs.append(out.flatten(0, -3))
        lses.append(None if lse is None else lse.flatten(0, -2))
    return _join(outs, order), None if lses[0] is None else _join(lses, order)


def _join(pieces: list[Tensor], order: Order) -> Tensor:
    """Results of the groups, entry after entry."""
    return _in_entries(pieces[0] if len(pieces) == 1 else torch.cat(pieces), order)


def _check_entries(layout: RaggedLayout, key_layout: RaggedLayout) -> None:
    if len(layout) != len(key_layout):
        raise ValueError(f"sizes has {len(layout)} entries and key_sizes {len(key_layout)}; they must be as many")
    for i, pair in enumerate(zip(layout.sizes, key_layout.sizes, strict=True)):
        queries, keys = map(prod, pair)
        if bool(queries) != bool(keys):
            raise ValueError(f"entry {i} has {queries} queries and {keys} keys; without the one, neither must exist")
