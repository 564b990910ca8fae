"""Public neighborhood attention: validation and semantics."""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal, Required, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ..common.arguments import operator
from ..common.calling import (
    Impl,
    Mask,
    PerHead,
    additional_visibility,
    check_additional,
    check_grids,
    on_grid,
    resolve_scale,
    without_autocast,
)
from . import dense, quantized
from .call import NeighborhoodCall, neighborhood, with_positive_scale
from .geometry import Axis, make_axes
from .heads import attend_groups, check_bias, head_groups
from .summary import find_neighborhoods, summarize

__all__ = [
    "make_axes",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
]


class SharedOptions(TypedDict, total=False):
    """Keyword arguments of every neighborhood attention but for `return_lse`, for type checkers."""

    window: Required[PerHead[int]]
    stride: PerHead[int]
    dilation: PerHead[int]
    causal: PerHead[bool]
    bias: Tensor | None
    scale: float | None
    additional_keys: Tensor | None
    additional_values: Tensor | None
    additional_mask: Mask | None
    impl: Impl


class Options(SharedOptions, total=False):
    """Those of `na1d`, `na2d` and `na3d`."""

    grid: Sequence[int] | None
    qk_dtype: torch.dtype | None


def _attend(
    rank, query, key, value, grid, window, stride, dilation, causal, bias, scale, additional_keys, additional_values,
    additional_mask, qk_dtype, impl, *, lse: bool,
) -> tuple[Tensor, Any]:  # fmt: skip
    """Output and, with `lse`, log-sum-exp of a call: arguments checked, heads of one geometry attended together."""
    names = ("query", "key", "value")
    query, key, value = (on_grid(name, x, rank, grid) for name, x in zip(names, (query, key, value), strict=True))
    check_grids(rank, query, key, value)
    neighborhood = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
    groups = head_groups(query.shape[1:-2], query.shape[-2], key.shape[-2], **neighborhood)
    if bias is not None:
        check_bias([[axis.window for axis in group.axes] for group in groups], query, bias)
    check_additional(key, value, additional_keys, additional_values)
    rest = {
        "scale": scale,
        "additional_mask": additional_visibility(additional_mask, additional_keys),
        "qk_dtype": qk_dtype,
        "impl": impl,
    }

    def attend(axes: tuple[Axis, ...], query: Tensor, key: Tensor, value: Tensor, **tensors):
        return _attend_axes(query, key, value, axes=axes, lse=lse, **tensors, **rest)

    out, found = attend_groups(groups, attend, query, key, value, bias, additional_keys, additional_values)
    if grid is None:
        return out, found
    return out.flatten(1, rank), None if found is None else found.flatten(1, rank)


def _attend_axes(
    query,
    key,
    value,
    *,
    axes,
    bias,
    scale,
    additional_keys,
    additional_values,
    additional_mask,
    qk_dtype,
    impl,
    lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output and, with `lse`, log-sum-exp of checked arguments."""
    extra = {
        "additional_keys": additional_keys,
        "additional_values": additional_values,
        "additional_mask": additional_mask,
    }
    given = {"axes": axes, "bias": bias, "scale": scale, **extra, "impl": impl}
    if qk_dtype is not None:
        out, found, mean = _attend_rounded(query, key, value, **given, qk_dtype=qk_dtype)
        return out, found + quantized.mean_logits(query, mean, resolve_scale(query, scale)) if lse else None
    tiles = not lse and additional_keys is None and neighborhood.select_impl(query, key, value, None, impl) == "torch"
    if tiles and dense.covers(axes, query, key, value, bias):
        with without_autocast(query.device):
            return dense.attend(query, key, value, axes=axes, scale=scale, bias=bias), None
    out, found = dispatch(query, key, value, **given)
    return out, found if lse else None


def _attend_rounded(
    query, key, value, *, axes, bias, additional_keys, additional_values, additional_mask, scale, qk_dtype, impl
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and log-sum-exp of query and key rounded to `qk_dtype`, the latter without what the mean of the keys adds,
    and that mean."""
    quantized.check(qk_dtype, query, key, value, bias, additional_keys, additional_values)
    query, scale = with_positive_scale(query, resolve_scale(query, scale))
    given = {
        "axes": axes,
        "scale": scale,
        "bias": bias,
        "additional_values": additional_values,
        "additional_mask": additional_mask,
    }
    e4m3 = neighborhood.select_impl(query, key, value, None, impl) == "triton" and quantized.obstacle(query) is None
    rounded = quantized.quantize(query, key, additional_keys, additional_mask, cast=e4m3)
    if e4m3:
        out, lse = quantized.attend(rounded, value, NeighborhoodCall(**given, additional_keys=rounded.additional_keys))
    else:
        query, key, additional_keys = quantized.restore(rounded, query.dtype)
        out, lse = dispatch(query, key, value, **given, additional_keys=additional_keys, impl=impl)
    return out, lse, rounded.mean


def dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    axes: tuple[Axis, ...],
    bias: Tensor | None,
    scale: float | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    impl: Impl,
    additional_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of checked arguments by the implementation that `impl` names."""
    call = NeighborhoodCall(
        axes, resolve_scale(query, scale), bias, additional_keys, additional_values, additional_mask
    )
    return neighborhood(query, key, value, call, impl=impl)


@overload
def na1d(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def na1d(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@neighborhood.public(find_neighborhoods, summarize=summarize)
@operator
def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: PerHead[int],
    stride: PerHead[int] = 1,
    dilation: PerHead[int] = 1,
    causal: PerHead[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    additional_mask: Mask | None = None,
    grid: Sequence[int] | None = None,
    qk_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Generalized neighborhood attention on a sequence: `na2d` with 1 spatial axis.

    Args:
        query: `[B, L, heads, head_dim]`; all else as in `na2d`, one value per axis where it takes several.

    Returns:
        output `[B, L, heads, value_dim]` in the dtype of query, and with `return_lse` the log-sum-exp `[B, L, heads]`.
    """
    additional = additional_keys, additional_values, additional_mask
    rest = grid, window, stride, dilation, causal, bias, scale, *additional, qk_dtype, impl
    out, lse = _attend(1, query, key, value, *rest, lse=return_lse)
    return (out, lse) if return_lse else out


@overload
def na2d(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def na2d(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@neighborhood.public(find_neighborhoods, summarize=summarize)
@operator
def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: PerHead[int],
    stride: PerHead[int] = 1,
    dilation: PerHead[int] = 1,
    causal: PerHead[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    additional_mask: Mask | None = None,
    grid: Sequence[int] | None = None,
    qk_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Generalized neighborhood attention on a 2-D grid (arXiv:2204.07143, arXiv:2209.15001, arXiv:2504.16922).

    Every query attends to `window` keys per axis around itself. At borders the window shifts inward, so a query that is
    not causal always sees exactly `window` keys per axis. Differentiable in every tensor argument.

    Args:
        query: `[B, H, W, heads, head_dim]`, float16, bfloat16, float32 or float64, any strides.
        key: `[B, H, W, key_heads, head_dim]`; heads is a multiple of key_heads (grouped-query attention).
        value: `[B, H, W, key_heads, value_dim]`, wider or narrower than key or as wide.
        window: keys per axis, 1 <= window <= length. An even window has window / 2 keys before the query and
            window / 2 - 1 after it.
        stride: consecutive queries that share a window, 1 <= stride <= window; stride = window is blocked attention.
        dilation: distance between the keys of a window, window * dilation <= length.
        causal: per axis, whether a query sees no key after itself. Window, stride, dilation and causal may differ
            between heads: a sequence of `heads` entries, of which each is a tuple of one value per axis, as in
            window=[(3, 3), (7, 7), …]. Heads of one neighborhood are attended together.
        bias: relative position table `[heads, 2 * window - 1, 2 * window - 1]`, any floating dtype, indexed by
            (key - query) / dilation + window - 1 and added to the scaled logits; odd windows only. Where windows differ
            between heads, `window` here is the largest on each axis, and smaller ones read the middle of their table.
        scale: factor on query . key; head_dim ** -0.5 when None.
        additional_keys, additional_values: `[B, tokens, key_heads, head_dim]` and `[…, value_dim]`, visible to every
            query (text tokens, registers), without bias.
        additional_mask: visible additional tokens, bool `[B, tokens]`, or their number at the start of each batch
            entry, integer `[B]`; all when None. A masked token may hold anything, NaN included, and has a gradient of
            zero. Lengths are from 0 to tokens, which is checked on CPU outside of graphs only: nothing waits for a
            device.
        grid: (H, W) of query, key and value that are `[B, H * W, heads, head_dim]`, as projections leave them, in C
            order and with any strides; the results have this layout, too.
        qk_dtype: torch.float8_e4m3fn rounds query and key, less the mean of its keys, to e4m3 with one power of two for
            each batch entry and head (SageAttention, arXiv:2410.02367, section 4.2), and matrix units that have
            products of e4m3 numbers make those at twice the rate of half precision. Values and probabilities stay as
            they are. Inference only; docs/numerics.md has the error.
        impl: "auto" takes the fused kernels on CUDA and ROCm and the tiled PyTorch path elsewhere; "triton", "gluon",
            "torch" or "reference" insist on one. "gluon" is a forward for Hopper in half precision, head dims 64 and
            128, whose values no GPU has checked yet. `foveal.kernels.ops.explain` says which a call takes and why.

    Returns:
        output `[B, H, W, heads, value_dim]` in the dtype of query, `[B, H * W, heads, value_dim]` with `grid`; with
        `return_lse` a tuple of it and the log-sum-exp `[B, H, W, heads]`, float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
        NotImplementedError: `impl` cannot take this call, or qk_dtype is given and a gradient asked for; the message
            says why.
    """
    additional = additional_keys, additional_values, additional_mask
    rest = grid, window, stride, dilation, causal, bias, scale, *additional, qk_dtype, impl
    out, lse = _attend(2, query, key, value, *rest, lse=return_lse)
    return (out, lse) if return_lse else out


@overload
def na3d(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def na3d(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@neighborhood.public(find_neighborhoods, summarize=summarize)
@operator
def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: PerHead[int],
    stride: PerHead[int] = 1,
    dilation: PerHead[int] = 1,
    causal: PerHead[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    additional_mask: Mask | None = None,
    grid: Sequence[int] | None = None,
    qk_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Generalized neighborhood attention on a 3-D grid: `na2d` with 3 spatial axes.

    Args:
        query: `[B, T, H, W, heads, head_dim]`; all else as in `na2d`, one value per axis where it takes several.

    Returns:
        output `[B, T, H, W, heads, value_dim]` in the dtype of query, and with `return_lse` the log-sum-exp
        `[B, T, H, W, heads]`.
    """
    additional = additional_keys, additional_values, additional_mask
    rest = grid, window, stride, dilation, causal, bias, scale, *additional, qk_dtype, impl
    out, lse = _attend(3, query, key, value, *rest, lse=return_lse)
    return (out, lse) if return_lse else out


@operator
def merge_attentions(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets from the attention over each; differentiable.

    A part in which a query sees nothing (log-sum-exp -inf) has no share in the result, whatever its output holds, and
    gets the gradient zero. A query that sees nothing in any part has output 0 and log-sum-exp -inf.

    Args:
        outs: outputs `[..., heads, value_dim]` of the same queries, one per key set, of one dtype.
        lses: their natural log-sum-exps `[..., heads]`.

    Returns:
        merged output in the dtype of `outs`, and merged log-sum-exp.

    Raises:
        ValueError, TypeError: no attentions, unequal numbers, shapes, dtypes or devices; the message names them.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be equally many and at least one, got {len(outs)} and {len(lses)}")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.dtype != outs[0].dtype:
            raise TypeError(f"outs[{i}].dtype={out.dtype} must equal outs[0].dtype={outs[0].dtype}")
        if lse.device != outs[0].device:
            raise ValueError(f"lses[{i}].device={lse.device} must equal outs[0].device={outs[0].device}")
        if out.dim() < 1 or out.shape != outs[0].shape or lse.shape != outs[0].shape[:-1]:
            raise ValueError(
                f"outs of {tuple(out.shape)} with lses of {tuple(lse.shape)} must be {tuple(outs[0].shape)} and "
                f"{tuple(outs[0].shape[:-1])}"
            )
    lse = torch.stack(list(lses))  # [parts, ..., heads]
    highest = lse.detach().amax(0)  # a constant: the result does not depend on it
    weights = (lse - highest.masked_fill(highest == -math.inf, 0)).exp()
    total = weights.sum(0)
    nothing = total == 0
    total = total.masked_fill(nothing, 1)  # the gradient of a logarithm of zero would be NaN
    hidden = (lse == -math.inf)[..., None]
    parts = [out.masked_fill(part, 0) for out, part in zip(outs, hidden, strict=True)]  # zero times NaN is NaN
    merged = reduce(torch.add, map(torch.mul, (weights / total)[..., None], parts))
    return merged.to(outs[0].dtype), (total.log() + highest).masked_fill(nothing, -math.inf)
