"""Public block-sparse attention."""

from torch import Tensor

from ..common.arguments import operator
from ..common.calling import Impl
from .call import block_sparse, make_call
from .mask import BlockMask


@block_sparse.public(make_call)
@operator
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: BlockMask,
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention in which every box of queries attends to its own list of boxes of keys, on 1-D, 2-D and 3-D grids.

    Cost and memory follow the lists, not the square of the tokens. Tokens stay where they are in memory: boxes are
    addressed inside the grid. Differentiable in query, key, value and the extras, once.

    Args:
        query: `[B, *spatial, heads, head_dim]` with 1 to 3 spatial axes, float16, bfloat16, float32 or float64, any
            strides.
        key: `[B, *key_spatial, key_heads, head_dim]`, as many axes as query, of any lengths; heads is a multiple of
            key_heads (grouped-query attention).
        value: `[B, *key_spatial, key_heads, value_dim]`.
        mask: the boxes and their lists; see `BlockMask`. A query whose list is empty, and that has no extra keys, gets
            output 0 and log-sum-exp -inf.
        scale: factor on query . key; head_dim ** -0.5 when None.
        extra_key, extra_value: `[B, tokens, key_heads, head_dim]` and `[…, value_dim]`, seen by every query (text,
            registers), without bias.
        impl: "auto" takes the fused kernels on CUDA and ROCm and the tiled PyTorch path elsewhere; "triton", "tiled"
            or "reference" insist on one. `foveal.kernels.ops.explain` says which a call takes and why.

    Returns:
        `[B, *spatial, heads, value_dim]` in the dtype of query.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
        NotImplementedError: `impl` cannot take this call; the message says why.
    """
    call = make_call(query, key, value, mask=mask, scale=scale, extra_key=extra_key, extra_value=extra_value)
    return block_sparse(query, key, value, call, impl=impl)[0]


@block_sparse.public(make_call)
@operator
def block_sparse_attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: BlockMask,
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`block_sparse_attention` and the natural log-sum-exp of its logits, both differentiable.

    Returns:
        output `[B, *spatial, heads, value_dim]` and log-sum-exp `[B, *spatial, heads]`, the latter float32, or float64
        for float64 inputs.
    """
    call = make_call(query, key, value, mask=mask, scale=scale, extra_key=extra_key, extra_value=extra_value)
    return block_sparse(query, key, value, call, impl=impl)
