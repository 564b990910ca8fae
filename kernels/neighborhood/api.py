"""Public neighborhood attention: validation, semantics and the choice of implementation."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Literal, TypeVar

import torch
from torch import Tensor

from . import library, reference, tiled
from .geometry import Axis

Impl = Literal["auto", "triton", "tiled", "reference"]
T = TypeVar("T")
PerAxis = T | Sequence[T]
IMPLEMENTATIONS = ("triton", "tiled", "reference")
HAS_TRITON = find_spec("triton") is not None
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TRITON_HEAD_DIM = 256


def _per_axis(name: str, value, rank: int, kind: type) -> tuple:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank:
        raise ValueError(f"{name}={value!r} has {len(values)} values; expected one, or one for each of {rank} axes")
    if kind is int and any(isinstance(v, (bool, float)) for v in values):
        raise TypeError(f"{name}={value!r} must hold integers")
    if kind is bool and not all(isinstance(v, bool) for v in values):
        raise TypeError(f"{name}={value!r} must hold booleans")
    return values


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
            _per_axis("window", window, rank, int),
            _per_axis("stride", stride, rank, int),
            _per_axis("dilation", dilation, rank, int),
            _per_axis("causal", causal, rank, bool),
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


def _check_tensors(rank: int, query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != rank + 3:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected [B, {rank} spatial axes, heads, head_dim]")
        if x.dtype != query.dtype or not x.dtype.is_floating_point:
            raise TypeError(f"{name}.dtype={x.dtype} must be a floating dtype and equal query.dtype={query.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name}.device={x.device} must equal query.device={query.device}")
    if key.shape != value.shape:
        raise ValueError(f"value.shape={tuple(value.shape)} must equal key.shape={tuple(key.shape)}")
    if key.shape[:-2] != query.shape[:-2] or key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key.shape={tuple(key.shape)} must equal query.shape={tuple(query.shape)} in all but the heads axis"
        )
    if min(key.shape[-2:]) < 1 or min(query.shape[1:]) < 1:
        raise ValueError(f"query.shape={tuple(query.shape)} must have no empty axis but the batch")
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(f"query heads ({query.shape[-2]}) must be a multiple of key heads ({key.shape[-2]})")


def _check_bias(axes: tuple[Axis, ...], query: Tensor, bias: Tensor) -> None:
    if any(axis.window % 2 == 0 for axis in axes):
        raise ValueError(f"window={[a.window for a in axes]} must be odd on every axis when bias is given")
    expected = (query.shape[-2], *(2 * axis.window - 1 for axis in axes))
    if tuple(bias.shape) != expected:
        raise ValueError(f"bias.shape={tuple(bias.shape)} must be [heads, 2 * window - 1 per axis] = {expected}")
    if not bias.dtype.is_floating_point or bias.device != query.device:
        raise ValueError(f"bias ({bias.dtype}, {bias.device}) must be floating point on query.device={query.device}")


def _check_extra(key: Tensor, extra_key: Tensor | None, extra_value: Tensor | None) -> None:
    if extra_key is None or extra_value is None:
        if extra_key is not extra_value:
            raise ValueError("extra_key and extra_value must be given together")
        return
    for name, x in (("extra_key", extra_key), ("extra_value", extra_value)):
        if x.dim() != 4 or x.shape[0] != key.shape[0] or x.shape[2:] != key.shape[-2:]:
            expected = f"[B={key.shape[0]}, tokens, key heads={key.shape[-2]}, head_dim={key.shape[-1]}]"
            raise ValueError(f"{name}.shape={tuple(x.shape)} must be {expected}")
        if x.dtype != key.dtype or x.device != key.device:
            raise ValueError(f"{name} ({x.dtype}, {x.device}) must match key ({key.dtype}, {key.device})")
    if extra_key.shape != extra_value.shape:
        raise ValueError(
            f"extra_value.shape={tuple(extra_value.shape)} must equal extra_key.shape={tuple(extra_key.shape)}"
        )


def triton_obstacle(query: Tensor) -> str | None:
    """Why the Triton kernels cannot take this call, or None when they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"device {query.device} is neither CUDA nor ROCm"
    if query.dtype not in TRITON_DTYPES:
        return f"dtype {query.dtype} is not float16, bfloat16 or float32"
    if query.shape[-1] > MAX_TRITON_HEAD_DIM:
        return f"head_dim {query.shape[-1]} exceeds {MAX_TRITON_HEAD_DIM}"
    return None


def choose(query: Tensor, impl: Impl = "auto") -> str:
    """Name of the implementation that serves `query`; an explicit request is kept or refused, never replaced."""
    if impl == "auto":
        return "triton" if query.device.type == "cuda" and triton_obstacle(query) is None else "tiled"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} must be one of {('auto', *IMPLEMENTATIONS)}")
    if impl == "triton" and (obstacle := triton_obstacle(query)) is not None:
        raise NotImplementedError(f"impl='triton' cannot take this call: {obstacle}")
    return impl


def obstacles(query: Tensor) -> dict[str, str | None]:
    """For every implementation, why it cannot take a call with this query, or None."""
    return {"triton": triton_obstacle(query), "tiled": None, "reference": None}


def _attend(
    rank, query, key, value, window, stride, dilation, causal, bias, scale, extra_key, extra_value, impl
) -> tuple[Tensor, Tensor]:
    _check_tensors(rank, query, key, value)
    axes = make_axes(query.shape[1:-2], window=window, stride=stride, dilation=dilation, causal=causal)
    if bias is not None:
        _check_bias(axes, query, bias)
    _check_extra(key, extra_key, extra_value)
    attend = {"triton": library.attend, "tiled": tiled.attend, "reference": reference.attend}[choose(query, impl)]
    device = query.device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if cast else nullcontext():  # the products accumulate in float32
        return attend(
            query,
            key,
            value,
            axes=axes,
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            bias=bias,
            extra_key=extra_key,
            extra_value=extra_value,
        )


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
    impl: Impl = "auto",
) -> Tensor:
    """Generalized neighborhood attention on a sequence: `na2d` with 1 spatial axis.

    Args:
        query: `[B, L, heads, head_dim]`; all else as in `na2d`, one value per axis where it takes several.

    Returns:
        `[B, L, heads, head_dim]` in the dtype of query.
    """
    return _attend(1, query, key, value, window, stride, dilation, causal, bias, scale, extra_key, extra_value, impl)[0]


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
        impl: "auto" takes the fused kernels on CUDA and ROCm and the tiled PyTorch path elsewhere; "triton", "tiled"
            or "reference" insist on one. `foveal.kernels.ops.explain` says which a call takes and why.

    Returns:
        `[B, H, W, heads, head_dim]` in the dtype of query.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
        NotImplementedError: `impl` cannot take this call; the message says why.
    """
    return _attend(2, query, key, value, window, stride, dilation, causal, bias, scale, extra_key, extra_value, impl)[0]


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
    impl: Impl = "auto",
) -> Tensor:
    """Generalized neighborhood attention on a 3-D grid: `na2d` with 3 spatial axes.

    Args:
        query: `[B, T, H, W, heads, head_dim]`; all else as in `na2d`, one value per axis where it takes several.

    Returns:
        `[B, T, H, W, heads, head_dim]` in the dtype of query.
    """
    return _attend(3, query, key, value, window, stride, dilation, causal, bias, scale, extra_key, extra_value, impl)[0]


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
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`na1d` and the natural log-sum-exp of its logits, both differentiable.

    Returns:
        output `[B, L, heads, head_dim]` and log-sum-exp `[B, L, heads]`, the latter
        float32, or float64 for float64 inputs.
    """
    return _attend(1, query, key, value, window, stride, dilation, causal, bias, scale, extra_key, extra_value, impl)


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
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`na2d` and the natural log-sum-exp of its logits, both differentiable.

    Returns:
        output `[B, H, W, heads, head_dim]` and log-sum-exp `[B, H, W, heads]`, the latter
        float32, or float64 for float64 inputs.
    """
    return _attend(2, query, key, value, window, stride, dilation, causal, bias, scale, extra_key, extra_value, impl)


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
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`na3d` and the natural log-sum-exp of its logits, both differentiable.

    Returns:
        output `[B, T, H, W, heads, head_dim]` and log-sum-exp `[B, T, H, W, heads]`, the latter
        float32, or float64 for float64 inputs.
    """
    return _attend(3, query, key, value, window, stride, dilation, causal, bias, scale, extra_key, extra_value, impl)


def merge_attentions(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets from the attention over each; differentiable.

    Args:
        outs: outputs `[..., heads, head_dim]` of the same queries, one per key set.
        lses: their natural log-sum-exps `[..., heads]`.

    Returns:
        merged output in the dtype of `outs[0]`, and merged log-sum-exp.

    Raises:
        ValueError: no attentions, unequal numbers or shapes.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be equally many and at least one, got {len(outs)} and {len(lses)}")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != outs[0].shape[:-1]:
            raise ValueError(
                f"outs of {tuple(out.shape)} with lses of {tuple(lse.shape)} must be {tuple(outs[0].shape)} and "
                f"{tuple(outs[0].shape[:-1])}"
            )
    stacked = torch.stack(list(lses))  # [parts, ..., heads]
    total = stacked.logsumexp(0)
    weights = (stacked - total.masked_fill(total == float("-inf"), 0)).exp()
    merged = (weights[..., None] * torch.stack(list(outs))).sum(0)
    return merged.to(outs[0].dtype), total
