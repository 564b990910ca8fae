"""Cost of linear attention: FLOPs and compulsory bytes of the fused passes, exact, on Python integers."""

from math import prod
from typing import Any

from torch import Tensor


def forward_flops(*, batch: int, heads: int, head_dim: int, value_dim: int, queries: int, keys: int) -> int:
    """FLOPs of the forward pass: a product of 2 * head_dim * value_dim for every key and every query.

    Args:
        batch, heads: batch entries and heads.
        head_dim, value_dim: features of keys and queries, and of values.
        queries, keys: how many of each a head has.
    """
    return 2 * batch * heads * head_dim * value_dim * (queries + keys)


def backward_flops(*, batch: int, heads: int, head_dim: int, value_dim: int, queries: int, keys: int) -> int:
    """FLOPs of the backward pass: two products for every key and every query; see `forward_flops`."""
    return 4 * batch * heads * head_dim * value_dim * (queries + keys)


def _operand_bytes(batch, heads, head_dim, value_dim, queries, keys, itemsize) -> tuple[int, int, int]:
    read = batch * heads * itemsize * (head_dim * (queries + keys) + value_dim * keys)
    out = batch * heads * itemsize * value_dim * queries
    return read, out, 4 * batch * heads * (head_dim * value_dim + head_dim + value_dim)


def forward_bytes(
    *, batch: int, heads: int, head_dim: int, value_dim: int, queries: int, keys: int, itemsize: int
) -> int:  # fmt: skip
    """Bytes that the forward pass must move: operands read once, the output written once, a state written and read.

    Args:
        batch, heads, head_dim, value_dim, queries, keys: as in `forward_flops`.
        itemsize: bytes of one element.
    """
    read, out, state = _operand_bytes(batch, heads, head_dim, value_dim, queries, keys, itemsize)
    return read + out + 2 * state


def backward_bytes(
    *, batch: int, heads: int, head_dim: int, value_dim: int, queries: int, keys: int, itemsize: int
) -> int:  # fmt: skip
    """Bytes that the backward pass must move: operands, the gradient of the output and the state read once, gradients
    written once, that of the state written and read; see `forward_bytes`."""
    read, out, state = _operand_bytes(batch, heads, head_dim, value_dim, queries, keys, itemsize)
    return 2 * read + out + 3 * state


def summarize(query: Tensor, key: Tensor, value: Tensor, call: Any, impl: str | None) -> dict[str, int | float | str]:
    """The cost of one call, by name, for `foveal.kernels.ops.explain`; no option of `linear_attention` changes it."""
    batch, heads, head_dim = query.shape[0], *query.shape[-2:]
    queries, keys, value_dim = prod(query.shape[1:-2]), prod(key.shape[1:-2]), value.shape[-1]
    sizes = dict(batch=batch, heads=heads, head_dim=head_dim, value_dim=value_dim, queries=queries, keys=keys)
    useful = head_dim * value_dim * (queries + keys)
    return {
        "queries": queries,
        "keys": keys,
        "dense_over_useful": round(queries * keys * (head_dim + value_dim) / useful, 2),
        "forward_flops": forward_flops(**sizes),
        "backward_flops": backward_flops(**sizes),
        "forward_bytes": forward_bytes(**sizes, itemsize=query.itemsize),
        "backward_bytes": backward_bytes(**sizes, itemsize=query.itemsize),
    }
