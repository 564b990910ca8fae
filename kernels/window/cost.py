"""Cost of window attention: useful FLOPs and compulsory bytes, exact, on Python integers."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .geometry import Axis, visible_pairs


def forward_flops(
    axes: Sequence[Axis], *, batch: int, heads: int, head_dim: int, value_dim: int | None = None
) -> int:  # fmt: skip
    """Useful FLOPs of the forward pass: two products a pair. Softmax and bias are not counted.

    Args:
        axes: the windows, as `make_axes` gives them.
        batch, heads: batch entries and query heads.
        head_dim: features of a head of query and key.
        value_dim: features of a head of value and output; head_dim when None.
    """
    return 2 * visible_pairs(tuple(axes)) * batch * heads * (head_dim + (value_dim or head_dim))


def backward_flops(
    axes: Sequence[Axis], *, batch: int, heads: int, head_dim: int, value_dim: int | None = None
) -> int:  # fmt: skip
    """Useful FLOPs of the backward pass: five products a pair (logits again, dP, dQ, dK, dV); see `forward_flops`."""
    return 2 * visible_pairs(tuple(axes)) * batch * heads * (3 * head_dim + 2 * (value_dim or head_dim))


def _operand_bytes(
    query: Tensor, key: Tensor, value: Tensor, axes: Sequence[Axis], bias: Tensor | None
) -> tuple[int, int, int, int]:
    """Bytes of query and output, of key and value, of the log-sum-exp and of the bias."""
    table = prod([a.window for a in axes]) * prod([a.span for a in axes]) * query.shape[-2]
    rows, key_rows, features = prod(query.shape[:-1]), prod(key.shape[:-1]), query.shape[-1] + value.shape[-1]
    return (
        rows * features * query.itemsize,
        key_rows * features * key.itemsize,
        rows * 4,
        0 if bias is None else table * bias.itemsize,
    )


def summarize(query: Tensor, key: Tensor, value: Tensor, call: Any, impl: str | None) -> dict[str, int | float | str]:
    """The cost of one call, by name, for `foveal.kernels.ops.explain`."""
    (batch, *shape, heads, head_dim), axes = query.shape, call.axes
    sizes = {"batch": batch, "heads": heads, "head_dim": head_dim, "value_dim": value.shape[-1]}
    queries, keys, lse, table = _operand_bytes(query, key, value, axes, call.bias)
    pairs = visible_pairs(axes)
    summary: dict[str, int | float | str] = {
        "windows": prod([a.windows for a in axes]),
        "visible_pairs": pairs,
        "keys_per_query": round(pairs / prod(shape), 2),
        "forward_flops": forward_flops(axes, **sizes),
        "backward_flops": backward_flops(axes, **sizes),
        "forward_bytes": queries + keys + lse + table,
        "backward_bytes": 2 * queries + 2 * keys + lse + 2 * table,
    }
    if impl == "triton":
        from ..common.launching import device_class
        from . import configs

        device = device_class(query.device) if torch.cuda.is_available() else "hopper"
        launch: dict = dict(head_dim=max(head_dim, value.shape[-1]), itemsize=query.itemsize, device=device)
        config = configs.choose("forward", axes, **launch, wide=False)
        summary["forward_tile"] = f"{config.pack} windows of {config.queries} queries by {config.keys} keys"
        one = configs.in_one_pass(axes, **launch)
        summary["backward_passes"] = "one, over windows" if one else "queries, then keys"
    return summary
