"""Public linear attention: validation and semantics."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..common import calling
from ..common.arguments import operator
from ..common.calling import Impl, is_compiled_on_cpu, is_plain_call, wants_gradient, without_autocast
from . import chunked, library, reference, tiled
from .options import Options, factors

__all__ = ["choose", "linear_attention", "obstacles"]

MAX_TRITON_HEAD_DIM = 128  # a program holds the whole state


def obstacles(query: Tensor, value: Tensor | None = None) -> dict[str, str | None]:
    """For every implementation, why it cannot take a call with this query, or None."""
    found = calling.obstacles(query)
    if found["triton"] is None and query.shape[-1] > MAX_TRITON_HEAD_DIM:
        found["triton"] = f"head_dim {query.shape[-1]} exceeds {MAX_TRITON_HEAD_DIM}"
    return found


def choose(query: Tensor, impl: Impl = "auto", value: Tensor | None = None) -> str:
    """Name of the implementation that serves `query`; an explicit request is kept or refused, never replaced."""
    obstacle = obstacles(query)["triton"]
    if impl == "triton" and obstacle is not None:
        raise NotImplementedError(f"impl='triton' cannot take this call: {obstacle}")
    chosen = calling.choose(query, impl)
    return "torch" if chosen == "triton" and obstacle is not None else chosen


def _plain(query: Tensor, key: Tensor, value: Tensor, scale: float | Tensor) -> Callable[..., Tensor]:
    """The plain PyTorch that suits a call: graphs that need nothing but torch, and other devices, take all tokens, as
    do few tokens without gradients, which are quicker so."""
    if is_compiled_on_cpu(query):
        return library.attend_chunked
    if query.device.type != "cpu" or not is_plain_call():
        return tiled.attend
    few = max(query.numel(), key.numel(), value.numel()) <= chunked.CHUNK
    return tiled.attend if few and not wants_gradient(query, key, value, factors(scale)[0]) else chunked.attend


def _check_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected [B, *spatial, heads, head_dim]")
        if x.dtype != query.dtype:
            raise TypeError(f"{name}.dtype={x.dtype} must equal query.dtype={query.dtype}")
        if any(n < 1 for n in x.shape[1:]):
            raise ValueError(f"{name}.shape={tuple(x.shape)} must have no empty axis but the batch")
    if key.shape[0] != query.shape[0] or key.shape[-2:] != query.shape[-2:]:
        raise ValueError(
            f"key.shape={tuple(key.shape)} must have the batch, heads and head_dim of query.shape={tuple(query.shape)}"
        )
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"value.shape={tuple(value.shape)} must equal key.shape={tuple(key.shape)} but in head_dim")


def _check_options(query: Tensor, centered: bool, eps: float | None, floor: float | None, scale: float | Tensor):
    if centered and not (eps is None and floor is None):
        raise ValueError(f"centered=True has no normaliser: eps={eps} and floor={floor} must be None")
    if eps is not None and floor is not None:
        raise ValueError(f"eps={eps} and floor={floor} exclude each other: one of them must be None")
    if eps is not None and not eps >= 0:
        raise ValueError(f"eps={eps} must be None or at least 0")
    if floor is not None and not floor > 0:
        raise ValueError(f"floor={floor} must be None or above 0")
    if isinstance(scale, Tensor) and scale.shape != query.shape[-2:-1]:
        raise ValueError(f"scale.shape={tuple(scale.shape)} must be [heads] = {tuple(query.shape[-2:-1])}")


@operator
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    relu: bool = False,
    mean: bool = False,
    centered: bool = False,
    eps: float | None = None,
    floor: float | None = None,
    scale: float | Tensor = 1.0,
    impl: Impl = "auto",
) -> Tensor:
    """Attention whose weights are products of features, not softmaxes of them: linear in the number of tokens.

    Every query reads one matrix, the sum of `key.T @ value` over all keys of its head:

        out = scale * (query @ sum(key.T @ value)) / normaliser

    The normaliser is 1; with `eps` it is `query @ sum(key) + eps` (arXiv:2006.16236, equation 5), with `floor` it is
    `max(query @ sum(key), floor)` (arXiv:2501.16182). With `centered` queries read the covariance of keys and values
    around their means, `out = mean(value) + scale * query @ cov(key, value)`, the injective attention of
    arXiv:2412.06590. Features other than ReLU are made before the call.

    Nothing is causal. Differentiable in query, key, value and a tensor of scales: once, with `impl="reference"` any
    number of times. Spatial axes are flattened in C order; queries and keys may lie on different grids, or on none:
    `[B, N, heads, head_dim]`.

    Args:
        query: `[B, *spatial, heads, head_dim]`, float16, bfloat16, float32 or float64, any strides.
        key: `[B, *key_spatial, heads, head_dim]`.
        value: `[B, *key_spatial, heads, value_dim]`.
        relu: take max(query, 0) and max(key, 0) instead of query and key.
        mean: average over keys where it says sum, in the normaliser, too.
        centered: subtract the means of keys and values, average, and add the mean value. Without a normaliser.
        eps: what is added to the normaliser, >= 0. Features must keep it away from zero.
        floor: the least that the normaliser may be, > 0. Its gradient is zero below.
        scale: factor on the sum, not on the normaliser and not on the mean value: a number, or `[heads]`.
        impl: "auto" takes the fused kernels on CUDA and ROCm and plain PyTorch elsewhere; "triton", "torch" or
            "reference" insist on one. `foveal.kernels.ops.explain` says which a call takes and why.

    Returns:
        `[B, *spatial, heads, value_dim]` in the dtype of query.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
        NotImplementedError: `impl` cannot take this call; the message says why.
    """
    _check_tokens(query, key, value)
    _check_options(query, centered, eps, floor, scale)
    options = Options(relu, mean or centered, centered, eps, floor)
    if not isinstance(scale, (Tensor, torch.SymFloat)):
        scale = float(scale)
    chosen = choose(query, impl)
    attend = {"triton": library.attend, "reference": reference.attend}.get(chosen) or _plain(query, key, value, scale)
    with without_autocast(query.device):
        return attend(query, key, value, options=options, scale=scale)
