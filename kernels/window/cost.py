"""What window attention costs: useful FLOPs and compulsory bytes, exact, on Python integers."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..calling import PerAxis
from .api import make_axes
from .geometry import Axis, visible_pairs


def forward_flops(axes: Sequence[Axis], *, batch: int, heads: int, head_dim: int) -> int:
    """Useful FLOPs of the forward pass: two products of 2 * head_dim a pair. Softmax and bias are not counted.

    Args:
        axes: the windows, as `make_axes` gives them.
        batch, heads: batch entries and query heads.
        head_dim: features of a head.
    """
    return 4 * visible_pairs(tuple(axes)) * batch * heads * head_dim


def backward_flops(axes: Sequence[Axis], *, batch: int, heads: int, head_dim: int) -> int:
    """Useful FLOPs of the backward pass: five products a pair (logits again, dP, dQ, dK, dV); see `forward_flops`."""
    return 10 * visible_pairs(tuple(axes)) * batch * heads * head_dim


def _operand_bytes(query: Tensor, key: Tensor, axes: Sequence[Axis], bias: Tensor | None) -> tuple[int, int, int, int]:
    table = prod(a.window for a in axes) * prod(a.span for a in axes) * query.shape[-2]
    return (
        query.numel() * query.itemsize,
        key.numel() * key.itemsize,
        query.numel() // query.shape[-1] * 4,
        0 if bias is None else table * bias.itemsize,
    )


def summarize(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    impl: str | None,
    window: PerAxis[int],
    shift: PerAxis[int] = 0,
    halo: PerAxis[int] = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> dict[str, int | float | str]:
    """The cost of one call, by name, for `foveal.kernels.ops.explain`; arguments as in `window_attention`."""
    batch, *shape, heads, head_dim = query.shape
    axes = make_axes(shape, window=window, shift=shift, halo=halo, key_shape=key.shape[1:-2])
    sizes = {"batch": batch, "heads": heads, "head_dim": head_dim}
    queries, keys, lse, table = _operand_bytes(query, key, axes, bias)
    pairs = visible_pairs(axes)
    summary: dict[str, int | float | str] = {
        "windows": prod(a.windows for a in axes),
        "visible_pairs": pairs,
        "keys_per_query": round(pairs / prod(shape), 2),
        "forward_flops": forward_flops(axes, **sizes),
        "backward_flops": backward_flops(axes, **sizes),
        "forward_bytes": 2 * queries + 2 * keys + lse + table,
        "backward_bytes": 4 * queries + 4 * keys + lse + 2 * table,
    }
    if impl == "triton":
        from ..launching import device_class
        from . import configs

        device = device_class(query.device) if torch.cuda.is_available() else "hopper"
        itemsize = query.itemsize
        config = configs.choose("forward", axes, head_dim=head_dim, itemsize=itemsize, device=device, wide=False)
        summary["forward_tile"] = f"{config.pack} windows of {config.queries} queries by {config.keys} keys"
        one = configs.in_one_pass(axes, head_dim=head_dim, itemsize=itemsize, device=device)
        summary["backward_passes"] = "one, over windows" if one else "queries, then keys"
    return summary
