"""Public scan attention: validation and semantics."""

from typing import Any, Literal, TypedDict, Unpack, overload

from torch import Tensor

from ..common.arguments import operator
from ..common.calling import Impl
from .call import make_call, scan


class Options(TypedDict, total=False):
    """Keyword arguments of `scan_attention` but for `return_state`, for type checkers."""

    log_decay: Tensor | None
    beta: Tensor | None
    scale: float
    direction: str
    state: Tensor | None
    impl: Impl


@overload
def scan_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_state: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def scan_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_state: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@scan.public(make_call)
@operator
def scan_attention(
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
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by a recurrence: every head has a matrix of state, which tokens write and read in their order.

    Token t changes the state and reads it:

        S_t = exp(log_decay_t) * S_(t-1) + outer(key_t, value_t)                                     beta is None
        S_t = S' + beta_t * outer(key_t, value_t - S'.T @ key_t),  S' = exp(log_decay_t) * S_(t-1)   the delta rule
        out_t = scale * S_t.T @ query_t

    This is linear attention with decay (Lightning attention, arXiv:2401.04658; Mamba-2's scalar gate,
    arXiv:2405.21060), DeltaNet (arXiv:2406.06484) and gated DeltaNet (arXiv:2412.06464). The cost is linear in the
    number of tokens. Spatial axes are flattened in C order; `scan_order` gives others.

    With `direction="backward"` the last token is the first to write. "both" is the sum of the two scans; without `beta`
    every pair of tokens is in it once: a token reads its own value in one of them only. There is no state of both.

    Differentiable once in all tensors, with `impl="reference"` any number of times.

    Args:
        query: `[B, *spatial, heads, head_dim]`, float16, bfloat16, float32 or float64, any strides.
        key: `[B, *spatial, heads, head_dim]`. The delta rule is stable for beta * |key|^2 from 0 to 2.
        value: `[B, *spatial, heads, value_dim]`.
        log_decay: `[heads]` or `[B, *spatial, heads]`: the logarithm of the decay, finite and at most 0; None for no
            decay. Above 0 states grow. float32 is advised.
        beta: `[B, *spatial, heads]`: how much of the difference from the value that is stored is written; None to add.
        scale: factor on the output.
        direction: "forward", "backward" or "both".
        state: `[B, heads, head_dim, value_dim]`, the state before the first token that writes; None for zeros.
        return_state: also return the state after the last.
        impl: "auto" takes the fused kernels on CUDA and ROCm and plain PyTorch elsewhere; "triton", "torch" or
            "reference" insist on one. `foveal.kernels.ops.explain` says which a call takes and why.

    Returns:
        output `[B, *spatial, heads, value_dim]` in the dtype of query; with `return_state` a tuple of it and the last
        state `[B, heads, head_dim, value_dim]`, in float32 or float64.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
        NotImplementedError: `impl` cannot take this call; the message says why.
    """
    options: dict[str, Any] = dict(log_decay=log_decay, beta=beta, scale=scale, direction=direction, state=state)
    call = make_call(query, key, value, **options, return_state=return_state)
    out, last = scan(query, key, value, call, impl=impl)
    return (out, last) if return_state else out
