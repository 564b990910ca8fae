"""Cost of neighborhood attention: useful FLOPs and compulsory bytes, exact, on Python integers.

The axes are independent: the pairs of the grid are the product of the pairs of each axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from . import geometry
from .geometry import Axis


def visible_pairs(axes: Sequence[Axis], *, extra: int = 0) -> int:
    """(query, key) pairs of one head of one batch entry: those of the window and `extra` keys a query."""
    return geometry.visible_pairs(tuple(axes)) + prod(map(geometry.query_count, axes)) * extra


def forward_flops(
    axes: Sequence[Axis], *, batch: int, heads: int, head_dim: int, value_dim: int | None = None, extra: int = 0
) -> int:
    """Useful FLOPs of the forward pass: two products a pair. Softmax and bias are not counted.

    Args:
        axes: the neighborhood, as `make_axes` gives it.
        batch, heads: batch entries and query heads.
        head_dim: features of a head of query and key.
        value_dim: features of a head of value and output; `head_dim` when None.
        extra: extra keys that every query sees.
    """
    return 2 * visible_pairs(axes, extra=extra) * batch * heads * (head_dim + (value_dim or head_dim))


def backward_flops(
    axes: Sequence[Axis], *, batch: int, heads: int, head_dim: int, value_dim: int | None = None, extra: int = 0
) -> int:
    """Useful FLOPs of the backward pass: five products a pair (logits again, dP, dQ, dK, dV); see `forward_flops`."""
    features = 3 * head_dim + 2 * (value_dim or head_dim)
    return 2 * visible_pairs(axes, extra=extra) * batch * heads * features


def _operand_bytes(
    axes, batch, heads, key_heads, head_dim, value_dim, itemsize, extra, bias
) -> tuple[int, int, int, int]:
    """Bytes of query and output, of key and value, of the log-sum-exp, and of the bias table."""
    queries, keys = (batch * prod(map(count, axes)) for count in (geometry.query_count, lambda axis: axis.length))
    row = (head_dim + (value_dim or head_dim)) * itemsize
    lse = queries * heads * 4
    table = heads * prod([2 * axis.window - 1 for axis in axes]) * 4 if bias else 0
    return queries * heads * row, (keys + batch * extra) * (key_heads or heads) * row, lse, table


def forward_bytes(
    axes: Sequence[Axis],
    *,
    batch: int,
    heads: int,
    head_dim: int,
    itemsize: int,
    value_dim: int | None = None,
    key_heads: int | None = None,
    extra: int = 0,
    bias: bool = False,
) -> int:
    """Bytes that the forward pass must move: each operand read once, output and float32 log-sum-exp written once.

    Args:
        axes, batch, heads, head_dim, value_dim, extra: as in `forward_flops`.
        itemsize: bytes of one element of query, key, value and output.
        key_heads: heads of key and value; `heads` when None.
        bias: whether there is a float32 bias table.
    """
    query, key, lse, table = _operand_bytes(axes, batch, heads, key_heads, head_dim, value_dim, itemsize, extra, bias)
    return query + key + lse + table


def backward_bytes(
    axes: Sequence[Axis],
    *,
    batch: int,
    heads: int,
    head_dim: int,
    itemsize: int,
    value_dim: int | None = None,
    key_heads: int | None = None,
    extra: int = 0,
    bias: bool = False,
) -> int:
    """Bytes that the backward pass must move: query, output and its gradient, key, value, log-sum-exp and table read
    once, the gradients of query, key, value and table written once; see `forward_bytes`."""
    query, key, lse, table = _operand_bytes(axes, batch, heads, key_heads, head_dim, value_dim, itemsize, extra, bias)
    return 2 * query + 2 * key + lse + 2 * table
