"""The operator that a compiled graph calls on CPU: dense attention of small maps, tiles for all others."""

from torch import Tensor

from . import dense, tiled
from .geometry import Axis


def forward(
    query: Tensor, key: Tensor, value: Tensor, *, axes: tuple[Axis, ...], scale: float, bias, extra_key, **extra
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; arguments as of `tiled.forward`."""
    found = None
    if dense.serves(axes, query, key, value, bias, extra_key):
        found = dense.forward(query, key, value, axes=axes, scale=scale)
    if found is not None:
        return found
    return tiled.forward(query, key, value, axes=axes, scale=scale, bias=bias, extra_key=extra_key, **extra)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    *,
    axes: tuple[Axis, ...],
    scale: float,
    bias,
    extra_key,
    **extra,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, bias, extra_key and extra_value; arguments as of `tiled.backward`."""
    if dense.serves(axes, query, key, value, bias, extra_key) and not grad_lse.any():
        grads = dense.backward(query, key, value, out, lse, grad_out, axes=axes, scale=scale)
        return *grads, None, None, None
    given = {"axes": axes, "scale": scale, "bias": bias, "extra_key": extra_key, **extra}
    return tiled.backward(query, key, value, out, lse, grad_out, grad_lse, **given)
