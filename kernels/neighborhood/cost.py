"""What a neighborhood costs: useful FLOPs and compulsory bytes, exact, on Python integers.

The axes are independent: the pairs of the grid are the product of the pairs of each axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from . import geometry, quantized
from .api import PerAxis, make_axes
from .geometry import Axis


def visible_pairs(axes: Sequence[Axis], *, extra: int = 0) -> int:
    """(query, key) pairs of one head of one batch entry: those of the window and `extra` keys a query."""
    return geometry.visible_pairs(tuple(axes)) + prod(map(geometry.query_count, axes)) * extra


def forward_flops(axes: Sequence[Axis], *, batch: int, heads: int, head_dim: int, extra: int = 0) -> int:
    """Useful FLOPs of the forward pass: two products of 2 * head_dim a pair. Softmax and bias are not counted.

    Args:
        axes: the neighborhood, as `make_axes` gives it.
        batch, heads: batch entries and query heads.
        head_dim: features of a head.
        extra: extra keys that every query sees.
    """
    return 4 * visible_pairs(axes, extra=extra) * batch * heads * head_dim


def backward_flops(axes: Sequence[Axis], *, batch: int, heads: int, head_dim: int, extra: int = 0) -> int:
    """Useful FLOPs of the backward pass: five products a pair (logits again, dP, dQ, dK, dV); see `forward_flops`."""
    return 10 * visible_pairs(axes, extra=extra) * batch * heads * head_dim


def _operand_bytes(axes, batch, heads, key_heads, head_dim, itemsize, extra, bias) -> tuple[int, int, int, int]:
    queries, keys = (batch * prod(map(count, axes)) for count in (geometry.query_count, lambda axis: axis.length))
    one_query = queries * heads * head_dim * itemsize
    one_key = (keys + batch * extra) * (key_heads or heads) * head_dim * itemsize
    lse = queries * heads * 4
    table = heads * prod(2 * axis.window - 1 for axis in axes) * 4 if bias else 0
    return one_query, one_key, lse, table


def forward_bytes(
    axes: Sequence[Axis],
    *,
    batch: int,
    heads: int,
    head_dim: int,
    itemsize: int,
    key_heads: int | None = None,
    extra: int = 0,
    bias: bool = False,
) -> int:
    """Bytes that the forward pass must move: each operand read once, output and float32 log-sum-exp written once.

    Args:
        axes, batch, heads, head_dim, extra: as in `forward_flops`.
        itemsize: bytes of one element of query, key, value and output.
        key_heads: heads of key and value; `heads` when None.
        bias: whether there is a float32 bias table.
    """
    query, key, lse, table = _operand_bytes(axes, batch, heads, key_heads, head_dim, itemsize, extra, bias)
    return 2 * query + 2 * key + lse + table


def backward_bytes(
    axes: Sequence[Axis],
    *,
    batch: int,
    heads: int,
    head_dim: int,
    itemsize: int,
    key_heads: int | None = None,
    extra: int = 0,
    bias: bool = False,
) -> int:
    """Bytes that the backward pass must move: query, output and its gradient, key, value, log-sum-exp and table read
    once, the gradients of query, key, value and table written once; see `forward_bytes`."""
    query, key, lse, table = _operand_bytes(axes, batch, heads, key_heads, head_dim, itemsize, extra, bias)
    return 4 * query + 4 * key + lse + 2 * table


def summarize(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    impl: str | None,
    window: PerAxis[int],
    stride: PerAxis[int] = 1,
    dilation: PerAxis[int] = 1,
    causal: PerAxis[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    qk_dtype: torch.dtype | None = None,
) -> dict[str, int | float | str]:
    """The cost of one call, by name, for `foveal.kernels.ops.explain`; arguments as in `na2d`."""
    batch, *shape, heads, head_dim = query.shape
    axes = make_axes(shape, window=window, stride=stride, dilation=dilation, causal=causal)
    extra = 0 if extra_key is None else extra_key.shape[1]
    sizes = {"batch": batch, "heads": heads, "head_dim": head_dim, "extra": extra}
    operands = {"key_heads": key.shape[-2], "itemsize": query.itemsize, "bias": bias is not None}
    tokens, pairs = prod(shape), visible_pairs(axes, extra=extra)
    summary: dict[str, int | float | str] = {
        "tokens": tokens,
        "keys_per_query": round(pairs / tokens, 2),
        "dense_over_useful": round(tokens * (tokens + extra) / pairs, 2),
        "forward_flops": forward_flops(axes, **sizes),
        "backward_flops": backward_flops(axes, **sizes),
        "forward_bytes": forward_bytes(axes, **sizes, **operands),
        "backward_bytes": backward_bytes(axes, **sizes, **operands),
    }
    e4m3 = False
    if qk_dtype is not None:
        why = quantized.obstacle(query) if impl == "triton" else f"impl is {impl}"
        e4m3, dtype = why is None, str(query.dtype).removeprefix("torch.")
        summary["query_key_products"] = "of e4m3 numbers" + ("" if e4m3 else f" restored to {dtype}: {why}")
    if impl == "triton":
        from ..launching import device_class
        from . import configs, simulator

        config = configs.choose(
            "forward",
            axes,
            head_dim=head_dim,
            itemsize=1 if e4m3 else query.itemsize,
            device=device_class(query.device) if torch.cuda.is_available() else "hopper",
            descriptor=False,  # neither this nor the width of offsets changes the tile
            wide=False,
        )
        rows, columns = config.queries[-len(axes) :], config.keys[-len(axes) :]  # kernels see three axes
        tiling = simulator.simulate(axes, rows, columns, extra=extra)
        summary["forward_tiles"] = f"{tiling}: queries by keys, {tiling.visited:,} visited a head"
        summary["useful_pairs"] = f"{tiling.efficiency:.0%} of those computed"
        summary["unmasked_tiles"] = f"{tiling.interior_share:.0%} of those visited"
        summary["dense_over_visited"] = round(tiling.speedup_bound, 2)
    return summary
