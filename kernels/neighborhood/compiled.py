"""The tiled path. As the operator that a compiled graph calls on CPU it takes dense attention of small maps."""

from collections.abc import Sequence

from torch import Tensor

from . import dense, tiled
from .call import NeighborhoodCall
from .tiled import attend

__all__ = ["attend", "backward", "forward"]


def forward(query: Tensor, key: Tensor, value: Tensor, call: NeighborhoodCall) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    if dense.serves(call.axes, query, key, value, call.bias, call.additional_keys):
        return dense.forward(query, key, value, axes=call.axes, scale=call.scale, bias=call.bias)
    return tiled.forward(query, key, value, call)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    call: NeighborhoodCall,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, bias, additional_keys and additional_values; see `tiled.backward`."""
    small = call.bias is None and dense.serves(call.axes, query, key, value, None, call.additional_keys)
    if small and not gradients[1].any():
        out, lse = outputs
        grads = dense.backward(query, key, value, out, lse, gradients[0], axes=call.axes, scale=call.scale)
        return *grads, None, None, None
    return tiled.backward(query, key, value, outputs, gradients, call, wanted)
