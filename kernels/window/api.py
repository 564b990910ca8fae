"""Public window attention: validation and semantics."""

from collections.abc import Sequence
from math import prod
from typing import Literal, Required, TypedDict, Unpack, overload

from torch import Tensor

from ..common.arguments import operator
from ..common.calling import Impl, PerAxis, check_grids, choose, obstacles, per_axis, resolve_scale, without_autocast
from ..common.symbolic import known
from . import library, reference, tiled
from .geometry import Axis
from .tables import spread_bias

__all__ = ["choose", "make_axes", "obstacles", "relative_bias", "window_attention"]


def make_axes(
    shape: Sequence[int],
    *,
    window: PerAxis[int],
    shift: PerAxis[int] = 0,
    halo: PerAxis[int] = 0,
    key_shape: Sequence[int] | None = None,
) -> tuple[Axis, ...]:
    """Validated axes of a grid.

    Args:
        shape: queries along each spatial axis.
        window, shift, halo: one value, or one per axis; see `window_attention`.
        key_shape: keys along each spatial axis: as many as queries, or 2 * halo more on every axis; `shape` when None.

    Raises:
        ValueError: a value outside its range; the message names it, the axis and what is accepted.
        TypeError: a value that is no integer.
    """
    rank = len(shape)
    windows, shifts, halos = (
        per_axis(name, value, rank, int) for name, value in (("window", window), ("shift", shift), ("halo", halo))
    )
    for i, (n, w, s, h) in enumerate(zip(shape, windows, shifts, halos, strict=True)):
        if known(w < 1) or known(w > n):
            raise ValueError(f"window={w} on axis {i} must lie in [1, length={n}]")
        if not 0 <= s < w:
            raise ValueError(f"shift={s} on axis {i} must lie in [0, window={w})")
        if h < 0:
            raise ValueError(f"halo={h} on axis {i} must not be negative")
    if any(halos) and any(shifts):
        raise ValueError(f"shift={shifts} cannot be combined with halo={halos}: one of them must be 0")
    enlarged = tuple(n + 2 * h for n, h in zip(shape, halos, strict=True))
    keys = tuple(shape if key_shape is None else key_shape)
    padded = any(halos) and keys == enlarged
    if not padded and keys != tuple(shape):
        wider = f", or larger by halo={halos} on every side, {enlarged}" if any(halos) else ""
        raise ValueError(f"key has a grid of {keys}; expected that of query, {tuple(shape)}{wider}")
    return tuple(Axis(*values, padded) for values in zip(shape, windows, shifts, halos, strict=True))


def _axes_of(query: Tensor, key: Tensor, value: Tensor, window, shift, halo) -> tuple[Axis, ...]:
    """Axes of a call, all tensors checked."""
    rank = query.dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(f"query has shape {tuple(query.shape)}; expected [B, 1 to 3 spatial axes, heads, head_dim]")
    if key.dim() != query.dim() or key.shape[:-1] != value.shape[:-1]:
        check_grids(rank, query, key, value)
    if any(n < 1 for n in query.shape[1:]):
        raise ValueError(f"query.shape={tuple(query.shape)} must have no empty axis but the batch")
    spatial = slice(1, 1 + rank)
    axes = make_axes(query.shape[spatial], window=window, shift=shift, halo=halo, key_shape=key.shape[spatial])
    inner = (slice(None), *(slice(a.margin, a.margin + a.length) for a in axes))
    check_grids(rank, query, key[inner], value[inner])
    return axes


def _check_bias(bias: Tensor, query: Tensor, axes: tuple[Axis, ...]) -> None:
    expected = (query.shape[-2], prod([a.window for a in axes]), prod([a.span for a in axes]))
    if tuple(bias.shape) != expected:
        raise ValueError(f"bias.shape={tuple(bias.shape)} must be [heads, window tokens, key tokens] = {expected}")


def _attend(query, key, value, window, shift, halo, bias, scale, impl, *, lse: bool):
    axes = _axes_of(query, key, value, window, shift, halo)
    if bias is not None:
        _check_bias(bias, query, axes)
    chosen = choose(query, impl, value)
    scale = resolve_scale(query, scale)
    with without_autocast(query.device):
        if chosen == "torch":
            return tiled.attend(query, key, value, axes=axes, scale=scale, bias=bias, lse=lse)
        implementation = library if chosen == "triton" else reference
        return implementation.attend(query, key, value, axes=axes, scale=scale, bias=bias)


class Options(TypedDict, total=False):
    """Keyword arguments of `window_attention` but for `return_lse`, for type checkers."""

    window: Required[PerAxis[int]]
    shift: PerAxis[int]
    halo: PerAxis[int]
    bias: Tensor | None
    scale: float | None
    impl: Impl


@overload
def window_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def window_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@operator
def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: PerAxis[int],
    shift: PerAxis[int] = 0,
    halo: PerAxis[int] = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention inside the windows of a sequence, an image or a clip (arXiv:2103.14030, arXiv:2103.12731).

    The grid is cut into windows from its origin, and every query attends to its window. Where the window does not
    divide an axis, the last one is partial: it has fewer keys. Nothing is rolled, padded or partitioned in memory by
    the fused kernels. Differentiable in every tensor argument.

    Args:
        query: `[B, *spatial, heads, head_dim]` with 1 to 3 spatial axes, float16, bfloat16, float32 or float64, any
            strides.
        key: `[B, *key_spatial, key_heads, head_dim]`; heads is a multiple of key_heads (grouped-query attention).
        value: `[B, *key_spatial, key_heads, value_dim]`. `key_spatial` is `spatial`, or with a halo `spatial` enlarged
            by it on every side.
        window: tokens per axis, 1 <= window <= length.
        shift: moves the cuts by as much, 0 <= shift < window: the windows are those of the grid rolled by -shift, and
            tokens that only the roll brought together do not see each other (Swin).
        halo: keys beyond every side of a window that it sees, too, >= 0; not together with a shift. Keys outside the
            grid do not exist, unless key and value bring them: enlarged by exactly `halo` on every side, their border
            takes part (timm's `HaloAttn` pads zeros).
        bias: `[heads, window tokens, key tokens]`, any of these dtypes, added to the scaled logits; token and key slots
            in C order, key tokens those of the window enlarged by the halo. With a shift, slots count inside the window
            of the rolled grid. Every query must keep a key whose bias is not -inf: of one that sees nothing the result
            is undefined. `relative_bias` makes one from a table.
        scale: factor on query . key; head_dim ** -0.5 when None.
        impl: "auto" takes the fused kernels on CUDA and ROCm and plain PyTorch elsewhere; "triton", "torch" or
            "reference" insist on one. `foveal.kernels.ops.explain` says which a call takes and why.

    Returns:
        output `[B, *spatial, heads, value_dim]` in the dtype of query; with `return_lse` a tuple of it and the
        log-sum-exp `[B, *spatial, heads]`, float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
        NotImplementedError: `impl` cannot take this call; the message says why.
    """
    out, lse = _attend(query, key, value, window, shift, halo, bias, scale, impl, lse=return_lse)
    return out if lse is None or not return_lse else (out, lse)


@operator
def relative_bias(table: Tensor, *, window: Sequence[int], halo: PerAxis[int] = 0) -> Tensor:
    """Spread a relative position table over the pairs of a window; differentiable.

    Args:
        table: `[heads, *(2 * (window + halo) - 1)]`, one entry for every offset key - query, the most negative first.
        window: tokens along each axis of a window.
        halo: keys beyond each side, one value or one per axis.

    Returns:
        `[heads, window tokens, key tokens]`, the `bias` of `window_attention`.

    Raises:
        ValueError: a table of another shape.
    """
    halos = per_axis("halo", halo, len(window), int)
    expected = tuple(2 * (w + h) - 1 for w, h in zip(window, halos, strict=True))
    if table.dim() != 1 + len(window) or tuple(table.shape[1:]) != expected:
        raise ValueError(
            f"table.shape={tuple(table.shape)} must be [heads, *(2 * (window + halo) - 1)] = [heads, *{expected}]"
        )
    return spread_bias(table, window, halos)
