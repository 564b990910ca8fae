"""Logits of chosen keys and queries given from elsewhere, the others the model's own (PrimeComposer)."""

from __future__ import annotations

import torch
from torch import Tensor

from ....kernels.common.calling import resolve_scale
from ....kernels.ops import merge_attentions
from ..channels import attend_with_lse


def overwrite_logits(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, logits: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention whose logits `X` are overwritten: `X[:, index] = logits`, then `X[index, :] = logits.T`.

    Differs from plain attention in the columns of a few keys and the rows of a few queries; all other keys are attended
    to as ever, and merged by their log-sum-exps.

    Args:
        query, key, value: `[B, tokens, heads, d]` of self-attention.
        index: numbers of the tokens, int64 `[n]`; empty is plain attention.
        logits: scaled logits `[B or 1, heads, tokens, n]`.
        scale: factor on query . key; head_dim ** -0.5 when None.

    Raises:
        ValueError: logits of another shape.
    """
    tokens, heads = query.shape[1:3]
    if logits.shape[1:] != (heads, tokens, len(index)):
        raise ValueError(f"logits of {tuple(logits.shape)} must be [B or 1, {heads}, {tokens}, {len(index)}]")
    scale = resolve_scale(query, scale)
    others = torch.ones(tokens, dtype=torch.bool, device=query.device)
    others[index] = False
    if not len(index):
        return attend_with_lse(query, key, value, scale)[0]
    logits = logits.to(query).expand(query.shape[0], -1, -1, -1)
    given = torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), value[:, index])
    parts, lses = [given], [logits.logsumexp(-1).transpose(1, 2)]
    if others.any():
        out, lse = attend_with_lse(query, key[:, others], value[:, others], scale)
        parts, lses = [*parts, out], [*lses, lse.to(query)]
    out = merge_attentions(parts, lses)[0]
    rows = torch.einsum("bhnm,bnhd->bmhd", logits.softmax(2), value)  # the second write wins where both meet
    return out.index_copy(1, index, rows)
