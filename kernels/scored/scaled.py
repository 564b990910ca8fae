"""Attention whose weights are multiplied after the softmax: scaled keys, forbidden pairs, with or without new sums."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..common.calling import check_grids, resolve_scale, wants_gradient, without_autocast
from .call import give_back, lay_out
from .chunked import chunk_rows
from .columns import ColumnMask


def scaled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_scale: Tensor | None = None,
    allowed: Tensor | ColumnMask | None = None,
    renormalize: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention with weights p_ij m_j a_ij, where the softmax is over all keys.

    Without `renormalize` rows sum to less than one, as in SAT (spatial-aware tokens), TCPA (prompts) and iLLaMA
    (a mask after the softmax); with it they are divided by their sum. Scaled keys alone take PyTorch's fused attention,
    on scaled values; forbidden pairs hold the logits of a chunk of queries at a time. Differentiable in all tensors.

    Args:
        query: `[B, *spatial, heads, head_dim]` with 1 to 3 spatial axes, any floating dtype.
        key, value: `[B, *key_spatial, key_heads, head_dim]` and `[…, value_dim]`; heads is a multiple of key_heads.
        key_scale: m, `[B or 1, heads or 1, keys]`, with keys in the C order of their grid; ones when None.
        allowed: a, bool `[B or 1, heads or 1, queries or 1, keys]`, or a `ColumnMask`; every pair when None.
        renormalize: divide rows by their sum; a row without weight gives 0.
        scale: factor on query . key; head_dim ** -0.5 when None.

    Returns:
        `[B, *spatial, heads, value_dim]` in the dtype of query.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; the message names the argument.
    """
    check_grids(query.dim() - 3, query, key, value, cross=True)
    scale = resolve_scale(query, scale)
    with without_autocast(query.device):
        q, k, v = lay_out(query, key, value)
        batch, heads, tokens, keys = *q.shape[:3], k.shape[2]
        if key_scale is not None:
            fits = key_scale.dim() == 3 and key_scale.shape[0] in (1, batch) and key_scale.shape[1] in (1, heads)
            if not fits or key_scale.shape[2] != keys:
                expected = f"[B={batch} or 1, heads={heads} or 1, keys={keys}]"
                raise ValueError(f"key_scale.shape={tuple(key_scale.shape)} must be {expected}")
        dense = _check_allowed(allowed, (batch, heads, tokens, keys))
        factor = None if key_scale is None else key_scale.to(q)[..., None].expand(batch, heads, keys, 1)
        if renormalize and (factor is not None or allowed is not None):
            ones = v.new_ones(batch, heads, keys, 1)
            v = torch.cat([v if factor is None else v * factor, ones if factor is None else factor], dim=-1)
        elif factor is not None:
            v = v * factor
        if allowed is None:
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        else:
            out = _forbidding(q, k, v, scale, allowed if dense is None else dense)
        if renormalize and (factor is not None or allowed is not None):
            total = out[..., -1:]
            out = out[..., :-1] / total.masked_fill(total == 0, 1.0)
        return give_back(out, query)


def _check_allowed(allowed: Tensor | ColumnMask | None, shape: tuple[int, ...]) -> Tensor | None:
    """A dense mask; None where there is none, or one of columns."""
    if allowed is None or isinstance(allowed, ColumnMask):
        if allowed is not None and allowed.num_keys != shape[3]:
            raise ValueError(f"allowed has {allowed.num_keys} keys; expected {shape[3]}")
        return None
    if allowed.dtype != torch.bool:
        raise TypeError(f"allowed.dtype={allowed.dtype} must be torch.bool")
    fits = allowed.dim() == 4 and all(a in (1, n) for a, n in zip(allowed.shape[:3], shape, strict=False))
    if not fits or allowed.shape[3] != shape[3]:
        raise ValueError(
            f"allowed.shape={tuple(allowed.shape)} must be [B={shape[0]} or 1, heads={shape[1]} or 1, "
            f"queries={shape[2]} or 1, keys={shape[3]}]"
        )
    return allowed


def _rows(allowed: Tensor | ColumnMask, tokens: int, first: int, last: int) -> Tensor:
    """Allowed pairs of queries `first` to `last`."""
    if isinstance(allowed, ColumnMask):
        return allowed.visible(tokens, first, last)
    return allowed if allowed.shape[2] == 1 else allowed[:, :, first:last]


def _forbidding(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor | ColumnMask) -> Tensor:
    """Weights of the full softmax on allowed pairs alone, by chunks of queries."""
    tokens = q.shape[2]
    rows = chunk_rows(q.shape[0], q.shape[1], k.shape[2])

    def part(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
        last = min(first + rows, tokens)
        weights = (q[:, :, first:last] @ k.mT * scale).softmax(-1)
        return (weights * _rows(allowed, tokens, first, last)) @ v

    call = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
    call = call if rows < tokens and wants_gradient(q, k, v) else part
    return torch.cat([call(q, k, v, first) for first in range(0, tokens, rows)], dim=2)
