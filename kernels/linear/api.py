"""Public linear attention: validation and semantics."""

import torch
from torch import Tensor

from ..common.arguments import operator
from ..common.calling import Impl
from .call import MAX_HEAD_DIM, linear, make_call


@linear.public(make_call)
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
    options = {"relu": relu, "mean": mean, "centered": centered, "eps": eps, "floor": floor}
    call = make_call(query, key, value, **options, scale=scale)
    impl = linear.select_impl(query, key, value, call, impl)
    if impl == "triton" and value.shape[-1] > MAX_HEAD_DIM:
        parts = [linear(query, key, part, call, impl=impl) for part in value.split(MAX_HEAD_DIM, -1)]
        return torch.cat(parts, -1)
    return linear(query, key, value, call, impl=impl)
