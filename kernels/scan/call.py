"""One call of scan attention: checked arguments, and the operators of torch's dispatcher that take them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ..common.calling import check_tokens
from ..common.operator import Operator
from . import cost

MAX_HEAD_DIM = 128  # of keys and of values in the kernels: a program holds all features of the keys
Direction = Literal["forward", "backward", "both"]


@dataclass(frozen=True)
class ScanCall:
    """Everything but query, key and value; see `api.scan_attention`.

    Attributes:
        log_decay, beta: `[B, tokens, heads]`.
        state: `[B, heads, head_dim, value_dim]`.
        scale: factor on outputs, not on states.
        direction: "forward", "backward" or "both".
        strict: a token does not read what it wrote itself. Without `beta`.
    """

    log_decay: Tensor | None = None
    beta: Tensor | None = None
    state: Tensor | None = None
    scale: float = 1.0
    direction: str = "forward"
    strict: bool = False

    @property
    def reverse(self) -> bool:
        return self.direction == "backward"

    def passes(self) -> tuple[ScanCall, ...]:
        """Calls of one direction each, whose outputs add up: of two sums over tokens the second leaves out the own."""
        if self.direction != "both":
            return (self,)
        return replace(self, direction="forward"), replace(self, direction="backward", strict=self.beta is None)


def _per_token(name: str, x: Tensor | None, query: Tensor) -> Tensor | None:
    """`[B, tokens, heads]` of an argument `[B, *spatial, heads]`."""
    if x is None:
        return None
    if x.shape != query.shape[:-1]:
        alike = "[heads] or " if name == "log_decay" else ""
        raise ValueError(
            f"{name}.shape={tuple(x.shape)} must be {alike}[B, *spatial, heads] = {tuple(query.shape[:-1])}"
        )
    return x.flatten(1, -2)


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float = 1.0,
    direction: str = "forward",
    state: Tensor | None = None,
    return_state: bool = False,
) -> ScanCall:
    """The call of arguments that fit together.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
    """
    check_tokens(query=query, key=key, value=value)
    if key.shape != query.shape:
        raise ValueError(
            f"key.shape={tuple(key.shape)} must equal query.shape={tuple(query.shape)}: one order for both"
        )
    if direction not in get_args(Direction):
        raise ValueError(f"direction={direction!r} must be one of {get_args(Direction)}")
    if direction == "both" and (return_state or state is not None):
        raise ValueError("direction='both' has two states: state must be None and return_state=False")
    if state is not None:
        expected = (query.shape[0], query.shape[-2], query.shape[-1], value.shape[-1])
        if state.shape != expected:
            raise ValueError(f"state.shape={tuple(state.shape)} must be [B, heads, head_dim, value_dim] = {expected}")
    if log_decay is not None and log_decay.dim() == 1 and log_decay.shape == query.shape[-2:-1]:
        log_decay = log_decay.expand(query.shape[:-1])
    number = scale if isinstance(scale, torch.SymFloat) else float(scale)
    gates = (_per_token("log_decay", log_decay, query), _per_token("beta", beta, query))
    return ScanCall(*gates, state, number, direction)


def out_and_state(query: Tensor, key: Tensor, value: Tensor, call: ScanCall) -> tuple[Tensor, Tensor]:
    """Empty output and last state, of both directions that of the first pass."""
    accumulate = torch.promote_types(query.dtype, torch.float32)
    state = query.new_empty(query.shape[0], *query.shape[-2:], value.shape[-1], dtype=accumulate)
    return query.new_empty(*query.shape[:-1], value.shape[-1]), state


def _flops(query: Tensor, key: Tensor, value: Tensor, call: ScanCall) -> tuple[int, int]:
    sizes, options = cost.sizes_of(query, value), cost.options_of(call)
    return cost.forward_flops(**sizes, **options), cost.backward_flops(**sizes, **options)


scan = Operator(
    "scan",
    package=__name__.rpartition(".")[0],
    call=ScanCall,
    differentiable=("log_decay", "beta", "state"),
    flops=_flops,
    summarize=cost.summarize,
    fake=out_and_state,
    modules={"triton": "launch", "torch": "chunked", "reference": "reference"},
    max_head_dims=(MAX_HEAD_DIM, MAX_HEAD_DIM),
    graph="torch",
    title="scan attention",
)
