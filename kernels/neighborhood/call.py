"""One call of neighborhood attention, and the operators of torch's dispatcher that take it.

There are two pairs of operators: the Triton kernels, and the tiled path as `torch.compile` sees it on CPU, where the
graph of its many small steps would take minutes to compile and then run more slowly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import copysign

from torch import Tensor

from ..common.calling import gluon_obstacle
from ..common.operator import Operator
from . import cost
from .geometry import Axis


@dataclass(frozen=True)
class NeighborhoodCall:
    """Everything but query, key and value of heads that share their windows; see `api.na2d`.

    `additional_mask` is bool here, `[B, tokens]`; axes may have a subset of the queries.
    """

    axes: tuple[Axis, ...]
    scale: float
    bias: Tensor | None = None
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None
    additional_mask: Tensor | None = None

    @property
    def additions(self) -> tuple[str, ...]:
        """Names of what is added to the logits or to the keys."""
        extra = self.additional_keys is not None and self.additional_keys.shape[1] > 0
        return ("bias",) * (self.bias is not None) + ("additional_keys",) * extra

    @property
    def additional(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Additional keys, their values, and which are visible."""
        return self.additional_keys, self.additional_values, self.additional_mask


def _flops(query: Tensor, key: Tensor, value: Tensor, call: NeighborhoodCall) -> tuple[int, int]:
    (batch, *_, heads, head_dim), extra = (
        query.shape,
        0 if call.additional_keys is None else call.additional_keys.shape[1],
    )
    sizes = dict(batch=batch, heads=heads, head_dim=head_dim, value_dim=value.shape[-1], extra=extra)
    return cost.forward_flops(call.axes, **sizes), cost.backward_flops(call.axes, **sizes)


def with_positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """Query and scale of the same logits; the kernels take positive scales."""
    if scale > 0:
        return query, scale
    return query * (copysign(1.0, scale) if scale else 0.0), abs(scale) or 1.0


def _prepare(query: Tensor, key: Tensor, value: Tensor, call: NeighborhoodCall) -> tuple:
    query, scale = with_positive_scale(query, call.scale)
    return query, key, value, call if scale == call.scale else replace(call, scale=scale)


GLUON_LACKS = {
    "bias": "its consumers have no registers left for a bias",
    "additional_keys": "it has no loop over additional keys",
}


def gluon_unsupported(query: Tensor, key: Tensor, value: Tensor, call) -> str | None:
    """Why the Gluon forward cannot take a call, or None; `call` has `additions`, or is None."""
    if (why := gluon_obstacle(query, key, value)) is not None:
        return why
    return next((GLUON_LACKS[name] for name in (() if call is None else call.additions)), None)


neighborhood = Operator(
    "neighborhood",
    package=__name__.rpartition(".")[0],
    call=NeighborhoodCall,
    differentiable=("bias", "additional_keys", "additional_values"),
    flops=_flops,
    modules={"triton": "launch", "gluon": "gluon", "torch": "compiled", "reference": "reference"},
    on_request={"gluon": gluon_unsupported},
    graph="torch",
    prepare=_prepare,
    title="neighborhood attention",
)
