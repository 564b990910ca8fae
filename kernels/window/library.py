"""`torch.ops.foveal.window_*`: schemas and FLOP formulas of the Triton path.

Only torch is imported here, so a first call may be a compiled one; the kernels are imported when they first run.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import operators
from .geometry import Axis


def _axes(shape: Sequence[int], window, shift, halo, padded: bool) -> tuple[Axis, ...]:
    """Axes of a query of that shape."""
    return tuple(Axis(*values, padded) for values in zip(shape[1:-2], window, shift, halo, strict=True))


def _unpack(query, key, bias, window, shift, halo, padded, scale) -> dict:
    """Arguments of `launch`."""
    return {"bias": bias, "axes": _axes(query.shape, window, shift, halo, padded), "scale": scale}


def _flops(query, key, value, bias, window, shift, halo, padded, scale) -> tuple[int, int]:
    from . import cost

    batch, *_, heads, head_dim = query
    axes = _axes(query, window, shift, halo, padded)
    sizes = dict(batch=batch, heads=heads, head_dim=head_dim, value_dim=value[-1])
    return cost.forward_flops(axes, **sizes), cost.backward_flops(axes, **sizes)


operators.define(
    "window",
    f"{__package__}.launch",
    extras=("bias",),
    rest="int[] window, int[] shift, int[] halo, bool padded, float scale",
    unpack=_unpack,
    flops=_flops,
    title="window attention with impl='triton'",
)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, axes: tuple[Axis, ...], scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp by the Triton kernels; see `api.window_attention`."""
    _, window, shift, halo, padded = zip(*axes, strict=True)
    return torch.ops.foveal.window_forward(query, key, value, bias, window, shift, halo, any(padded), scale)
