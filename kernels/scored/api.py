"""Public scored attention: validation and semantics."""

from typing import Literal, Required, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ..common.arguments import operator
from ..common.calling import Impl, Mask, without_autocast
from . import chunked, cost, reference
from .call import ScoredCall, make_call, scored
from .columns import ColumnMask
from .score import CLASSES, Score


class Options(TypedDict, total=False):
    """Keyword arguments of `scored_attention` but for `return_lse`, for type checkers."""

    score: Required[Score]
    mask: ColumnMask | None
    order: Mask | None
    scale: float | None
    impl: Impl


def _fused(query: Tensor, key: Tensor, value: Tensor, call: ScoredCall) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp by the Triton kernels; the latter is None where the score has none."""
    out, lse = scored.dispatch("triton", query, key, value, call)
    return out, lse if call.score.has_lse else None


ATTEND = {"triton": _fused, "torch": chunked.attend, "reference": reference.attend}


@overload
def scored_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def scored_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@scored.public(make_call, summarize=cost.summarize)
@operator
def scored_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: Score,
    mask: ColumnMask | None = None,
    order: Mask | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of all tokens whose weights are another function of the logits than their softmax.

    Differentiable in query, key, value and the tensors of the score; in PyTorch any number of times, by the kernels
    once. Softmax, Signed, Softplus, CoPE and Parallax have Triton kernels. In PyTorch scores whose rows are independent
    keep the logits of a chunk of queries at a time; `explain` says which do, and what is held.

    Args:
        query: `[B, *spatial, heads, head_dim]` with 1 to 3 spatial axes, float16, bfloat16, float32 or float64, any
            strides. Computed in float32 at least.
        key: `[B, *key_spatial, key_heads, head_dim]`, of any lengths; heads is a multiple of key_heads.
        value: `[B, *key_spatial, key_heads, value_dim]`.
        score: `Softmax()`, `Signed()`, `Softplus(…)`, `CoPE(…)`, `Path(…)`, `Selective(…)`, `MultiToken(…)`,
            `Parallax(…)`, `LocalLinear(…)` or `Filter(…)` of `foveal.kernels.scored`.
        mask: visibility by intervals of queries per key, see `ColumnMask`, in the order of memory; a query that sees
            no key gets 0.
        order: permutation of the tokens `[tokens]`, in which ordered scores count them; memory order when None. Not
            together with a score that has tensors per token, which are in the order of the score.
        scale: factor on query . key; head_dim ** -0.5 when None.
        return_lse: return the log-sum-exp, too, of scores that have one.
        impl: "auto" takes the Triton kernels on CUDA and ROCm where the score has them, and "triton" insists; "torch"
            takes PyTorch by chunks, "reference" all logits at once.

    Returns:
        output `[B, *spatial, heads, value_dim]` in the dtype of query; with `return_lse` a tuple of it and the
        log-sum-exp `[B, *spatial, heads]`, float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
        NotImplementedError: `impl` cannot take this call; on CUDA also "auto", for scores that hold all logits
            (class F4): ask for "torch" to accept that.
    """
    call = make_call(query, key, value, score=score, mask=mask, order=order, scale=scale)
    chosen = scored.select_impl(query, key, value, call, impl)
    if impl == "auto" and query.device.type == "cuda" and score.fusibility == "F4":
        raise NotImplementedError(f"{type(score).__name__} is of class F4, {CLASSES['F4']}; ask for it by impl='torch'")
    if return_lse and not score.has_lse:
        raise ValueError(f"return_lse=True: weights of {type(score).__name__} have no log-sum-exp")
    with without_autocast(query.device):
        out, lse = _in_order(query, key, value, call, ATTEND[chosen])
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _in_order(query, key, value, call, attend) -> tuple[Tensor, Tensor | None]:
    """Attend with the tokens in the order of the call."""
    if call.order is None:
        return attend(query, key, value, call)
    q, k, v = (x.flatten(1, -3)[:, call.order] for x in (query, key, value))
    mask = call.mask
    if mask is not None:
        columns = {
            n: x[:, :, call.order] for n in ("start", "end", "start2", "end2") if (x := getattr(mask, n)) is not None
        }
        mask = ColumnMask(**columns, rows=mask.positions(q.shape[1])[call.order])
    out, lse = attend(q, k, v, type(call)(call.score, mask, None, call.scale))
    back = torch.empty_like(call.order).scatter_(0, call.order, torch.arange(q.shape[1], device=call.order.device))
    out = out[:, back].reshape(*query.shape[:-1], out.shape[-1])
    return out, None if lse is None else lse[:, back].reshape(query.shape[:-1])
