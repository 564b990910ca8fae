"""Public window attention: validation and semantics."""

from collections.abc import Sequence
from typing import Literal, Required, TypedDict, Unpack, overload

from torch import Tensor

from ..common.arguments import operator
from ..common.calling import Impl, PerAxis, per_axis
from .call import make_call, window_operator
from .tables import spread_bias


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
@window_operator.public(make_call)
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
    call = make_call(
        query, key, value, window=window, shift=shift, halo=halo, bias=bias, scale=scale, return_lse=return_lse
    )
    out, lse = window_operator(query, key, value, call, impl=impl)
    return (out, lse) if return_lse else out


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
