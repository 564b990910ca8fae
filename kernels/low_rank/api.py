"""Public attention with a bias of low rank."""

from torch import Tensor

from ..common.arguments import operator
from .call import low_rank, make_call


@low_rank.public(make_call)
@operator
def biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_factor: Tensor,
    key_factor: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Dense attention with the bias `query_factor @ key_factor.T`, which is never formed (FlashBias, arXiv:2505.12044).

    PyTorch's fused attention over widened heads; it reads (queries + keys) * rank numbers where a dense bias has
    queries * keys. Differentiable in all tensors.

    Args:
        query: `[B, *spatial, heads, head_dim]`.
        key: `[B, *key_spatial, heads, head_dim]`, on a grid of its own.
        value: `[B, *key_spatial, heads, value_dim]`.
        query_factor, key_factor, scale: as in `widen`.

    Returns:
        `[B, *spatial, heads, value_dim]` in the dtype of query.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
    """
    call = make_call(query, key, value, query_factor=query_factor, key_factor=key_factor, scale=scale)
    return low_rank(query, key, value, call)
