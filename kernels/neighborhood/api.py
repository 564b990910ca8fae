"""Public neighborhood attention: validation and semantics."""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ..arguments import operator
from ..calling import (
    Impl,
    PerAxis,
    check_extra,
    check_grids,
    choose,
    is_compiled_on_cpu,
    obstacles,
    per_axis,
    resolve_scale,
    without_autocast,
)
from . import dense, library, quantized, reference, tiled
from .geometry import Axis

__all__ = [
    "choose",
    "make_axes",
    "merge_attentions",
    "na1d",
    "na1d_lse",
    "na2d",
    "na2d_lse",
    "na3d",
    "na3d_lse",
    "obstacles",
]


def make_axes(
    shape: Sequence[int],
    *,
    window: PerAxis[int],
    stride: PerAxis[int] = 1,
    dilation: PerAxis[int] = 1,
    causal: PerAxis[bool] = False,
) -> tuple[Axis, ...]:
    """Validated axes of a grid.

    Args:
        shape: tokens along each spatial axis.
        window, stride, dilation, causal: one value, or one per axis; see `na2d`.

    Raises:
        ValueError: a value outside its range; the message names it, the axis and what is accepted.
        TypeError: a value that is no integer (or, for `causal`, no boolean).
    """
    rank = len(shape)
    axes = tuple(
        Axis(*values)
        for values in zip(
            shape,
            per_axis("window", window, rank, int),
            per_axis("stride", stride, rank, int),
            per_axis("dilation", dilation, rank, int),
            per_axis("causal", causal, rank, bool),
            strict=True,
        )
    )
    for i, axis in enumerate(axes):
        if axis.window < 1:
            raise ValueError(f"window={axis.window} on axis {i} must be at least 1")
        if axis.window > axis.length:
            raise ValueError(f"window={axis.window} on axis {i} must not exceed its length {axis.length}")
        if not 1 <= axis.stride <= axis.window:
            raise ValueError(f"stride={axis.stride} on axis {i} must lie in [1, window={axis.window}]")
        if axis.dilation < 1:
            raise ValueError(f"dilation={axis.dilation} on axis {i} must be at least 1")
        if axis.window * axis.dilation > axis.length:
            raise ValueError(
                f"dilation={axis.dilation} times window={axis.window} on axis {i} must not exceed its "
                f"length {axis.length}"
            )
    return axes


def check_bias(axes: tuple[Axis, ...], query: Tensor, bias: Tensor) -> None:
    if any(axis.window % 2 == 0 for axis in axes):
        raise ValueError(f"window={[a.window for a in axes]} must be odd on every axis when bias is given")
    expected = (query.shape[-2], *(2 * axis.window - 1 for axis in axes))
    if tuple(bias.shape) != expected:
        raise ValueError(f"bias.shape={tuple(bias.shape)} must be [heads, 2 * window - 1 per axis] = {expected}")


def _axes_of(rank, query, key, value, window, stride, dilation, causal, bias, extra_key, extra_value):
    """Axes of a call, all arguments checked."""
    check_grids(rank, query, key, value)
    if value.shape != key.shape:
        raise ValueError(f"value.shape={tuple(value.shape)} must equal key.shape={tuple(key.shape)}")
    axes = make_axes(query.shape[1:-2], window=window, stride=stride, dilation=dilation, causal=causal)
    if bias is not None:
        check_bias(axes, query, bias)
    check_extra(key, value, extra_key, extra_value)
    return axes


def _attend(
    rank, query, key, value, window, stride, dilation, causal, bias, scale, extra_key, extra_value, qk_dtype, impl
) -> Tensor:
    axes = _axes_of(rank, query, key, value, window, stride, dilation, causal, bias, extra_key, extra_value)
    given = {"axes": axes, "bias": bias, "extra_key": extra_key, "extra_value": extra_value}
    if qk_dtype is not None:
        return _attend_rounded(query, key, value, **given, scale=scale, qk_dtype=qk_dtype, impl=impl)[0]
    if extra_key is None and choose(query, impl) == "tiled" and dense.covers(axes, query, key, value, bias):
        with without_autocast(query.device):
            return dense.attend(query, key, value, axes=axes, scale=scale, bias=bias)
    return dispatch(query, key, value, **given, scale=scale, impl=impl)[0]


def _attend_lse(
    rank, query, key, value, window, stride, dilation, causal, bias, scale, extra_key, extra_value, qk_dtype, impl
) -> tuple[Tensor, Tensor]:
    axes = _axes_of(rank, query, key, value, window, stride, dilation, causal, bias, extra_key, extra_value)
    given = {"axes": axes, "bias": bias, "extra_key": extra_key, "extra_value": extra_value}
    if qk_dtype is None:
        return dispatch(query, key, value, **given, scale=scale, impl=impl)
    out, lse, mean = _attend_rounded(query, key, value, **given, scale=scale, qk_dtype=qk_dtype, impl=impl)
    return out, lse + quantized.mean_logits(query, mean, resolve_scale(query, scale))


def _attend_rounded(
    query, key, value, *, axes, bias, extra_key, extra_value, scale, qk_dtype, impl
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and log-sum-exp of query and key rounded to `qk_dtype`, the latter without what the mean of the keys adds,
    and that mean."""
    quantized.check(qk_dtype, query, key, value, bias, extra_key, extra_value)
    query, scale = library.with_positive_scale(query, resolve_scale(query, scale))
    given = {"axes": axes, "scale": scale, "bias": bias, "extra_value": extra_value}
    e4m3 = choose(query, impl) == "triton" and quantized.obstacle(query) is None
    rounded = quantized.quantize(query, key, extra_key, cast=e4m3)
    if e4m3:
        out, lse = quantized.attend(rounded, value, **given)
    else:
        query, key, extra_key = quantized.restore(rounded, query.dtype)
        out, lse = dispatch(query, key, value, **given, extra_key=extra_key, impl=impl)
    return out, lse, rounded.mean


def dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    axes: tuple[Axis, ...],
    bias: Tensor | None,
    scale: float | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of checked arguments by the implementation that `impl` names."""
    tiles = library.attend_tiled if is_compiled_on_cpu(query) else tiled.attend
    attend = {"triton": library.attend, "tiled": tiles, "reference": reference.attend}[choose(query, impl)]
    with without_autocast(query.device):
        return attend(
            query,
            key,
            value,
            axes=axes,
            scale=resolve_scale(query, scale),
            bias=bias,
            extra_key=extra_key,
            extra_value=extra_value,
        )


@operator
def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: PerAxis[int],
    stride: PerAxis[int] = 1,
    dilation: PerAxis[int] = 1,
    causal: PerAxis[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    qk_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Generalized neighborhood attention on a sequence: `na2d` with 1 spatial axis.

    Args:
        query: `[B, L, heads, head_dim]`; all else as in `na2d`, one value per axis where it takes several.

    Returns:
        `[B, L, heads, head_dim]` in the dtype of query.
    """
    rest = window, stride, dilation, causal, bias, scale, extra_key, extra_value, qk_dtype, impl
    return _attend(1, query, key, value, *rest)


@operator
def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: PerAxis[int],
    stride: PerAxis[int] = 1,
    dilation: PerAxis[int] = 1,
    causal: PerAxis[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    qk_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Generalized neighborhood attention on a 2-D grid (arXiv:2204.07143, arXiv:2209.15001, arXiv:2504.16922).

    Every query attends to `window` keys per axis around itself. At borders the window shifts inward, so a query that is
    not causal always sees exactly `window` keys per axis. Differentiable in every tensor argument.

    Args:
        query: `[B, H, W, heads, head_dim]`, float16, bfloat16, float32 or float64, any strides.
        key, value: `[B, H, W, key_heads, head_dim]`; heads is a multiple of key_heads (grouped-query attention).
        window: keys per axis, 1 <= window <= length. An even window has window / 2 keys before the query and
            window / 2 - 1 after it.
        stride: consecutive queries that share a window, 1 <= stride <= window; stride = window is blocked attention.
        dilation: distance between the keys of a window, window * dilation <= length.
        causal: per axis, whether a query sees no key after itself.
        bias: relative position table `[heads, 2 * window - 1, 2 * window - 1]`, any floating dtype, indexed by
            (key - query) / dilation + window - 1 and added to the scaled logits; odd windows only.
        scale: factor on query . key; head_dim ** -0.5 when None.
        extra_key, extra_value: `[B, tokens, key_heads, head_dim]`, seen by every query (text, registers), without bias.
        qk_dtype: torch.float8_e4m3fn rounds query and key, less the mean of its keys, to e4m3 with one power of two for
            each batch entry and head (SageAttention, arXiv:2410.02367, section 4.2), and matrix units that have
            products of e4m3 numbers make those at twice the rate of half precision. Values and probabilities stay as
            they are. Inference only; docs/numerics.md has the error.
        impl: "auto" takes the fused kernels on CUDA and ROCm and the tiled PyTorch path elsewhere; "triton", "tiled"
            or "reference" insist on one. `foveal.kernels.ops.explain` says which a call takes and why.

    Returns:
        `[B, H, W, heads, head_dim]` in the dtype of query.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
        NotImplementedError: `impl` cannot take this call, or qk_dtype is given and a gradient asked for; the message
            says why.
    """
    rest = window, stride, dilation, causal, bias, scale, extra_key, extra_value, qk_dtype, impl
    return _attend(2, query, key, value, *rest)


@operator
def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: PerAxis[int],
    stride: PerAxis[int] = 1,
    dilation: PerAxis[int] = 1,
    causal: PerAxis[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    qk_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Generalized neighborhood attention on a 3-D grid: `na2d` with 3 spatial axes.

    Args:
        query: `[B, T, H, W, heads, head_dim]`; all else as in `na2d`, one value per axis where it takes several.

    Returns:
        `[B, T, H, W, heads, head_dim]` in the dtype of query.
    """
    rest = window, stride, dilation, causal, bias, scale, extra_key, extra_value, qk_dtype, impl
    return _attend(3, query, key, value, *rest)


@operator
def na1d_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: PerAxis[int],
    stride: PerAxis[int] = 1,
    dilation: PerAxis[int] = 1,
    causal: PerAxis[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    qk_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`na1d` and the natural log-sum-exp of its logits, both differentiable.

    Returns:
        output `[B, L, heads, head_dim]` and log-sum-exp `[B, L, heads]`, the latter
        float32, or float64 for float64 inputs.
    """
    rest = window, stride, dilation, causal, bias, scale, extra_key, extra_value, qk_dtype, impl
    return _attend_lse(1, query, key, value, *rest)


@operator
def na2d_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: PerAxis[int],
    stride: PerAxis[int] = 1,
    dilation: PerAxis[int] = 1,
    causal: PerAxis[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    qk_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`na2d` and the natural log-sum-exp of its logits, both differentiable.

    Returns:
        output `[B, H, W, heads, head_dim]` and log-sum-exp `[B, H, W, heads]`, the latter
        float32, or float64 for float64 inputs.
    """
    rest = window, stride, dilation, causal, bias, scale, extra_key, extra_value, qk_dtype, impl
    return _attend_lse(2, query, key, value, *rest)


@operator
def na3d_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: PerAxis[int],
    stride: PerAxis[int] = 1,
    dilation: PerAxis[int] = 1,
    causal: PerAxis[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    qk_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`na3d` and the natural log-sum-exp of its logits, both differentiable.

    Returns:
        output `[B, T, H, W, heads, head_dim]` and log-sum-exp `[B, T, H, W, heads]`, the latter
        float32, or float64 for float64 inputs.
    """
    rest = window, stride, dilation, causal, bias, scale, extra_key, extra_value, qk_dtype, impl
    return _attend_lse(3, query, key, value, *rest)


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
