"""PyTorch's fused attention on CPU, with the log-sum-exp that a backward needs.

`scaled_dot_product_attention` calls these operators on CPU and does not return their log-sum-exp.
"""

import torch
from torch import Tensor

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[B, heads, n, d]` and natural log-sum-exp `[B, heads, n]`.

    Rows that see no key have output and log-sum-exp of zero.

    Args:
        query: `[B, heads, n, d]` with features side by side in memory, as of
        key, value: `[B, heads, m, d]`, of the same heads and width.
        mask: added to logits, of four dims that broadcast to `[B, heads, n, m]`, in the dtype of `query`.
        scale: factor of the logits.
    """
    return _FORWARD(query, key, value, attn_mask=mask, scale=scale)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value where the log-sum-exp has none; arguments are those of `forward`."""
    return _BACKWARD(grad_out, query, key, value, out, lse, 0.0, False, attn_mask=mask, scale=scale)
