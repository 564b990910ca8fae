"""PyTorch that holds the logits of a chunk of queries at a time, in the backward pass, too."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..common.calling import wants_gradient
from . import reference
from .call import ScoredCall, give_back, give_back_lse, lay_out, rows_of

CHUNK = 2**22  # logits at a time: 16 MiB of float32, within the caches of few cores


def chunk_rows(batch: int, heads: int, keys: int) -> int:
    """Queries of a chunk; at least 16, below which products are too thin."""
    return max(16, CHUNK // max(1, batch * heads * keys))


def attend(query: Tensor, key: Tensor, value: Tensor, call: ScoredCall) -> tuple[Tensor, Tensor | None]:
    """Output `[B, *spatial, heads, value_dim]`, and log-sum-exp `[B, *spatial, heads]` or None."""
    q, k, v = lay_out(query, key, value)
    batch, heads, tokens, _ = q.shape
    rows = chunk_rows(batch, heads, k.shape[2])
    if not call.score.by_rows or rows >= tokens:
        return reference.attend(query, key, value, call)

    def part(q: Tensor, k: Tensor, v: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        return call.score.attend(rows_of(q, k, v, call.mask, call.scale, first, min(first + rows, tokens)))

    parameters = [x for x in vars(call.score).values() if isinstance(x, Tensor)]
    recomputed = wants_gradient(q, k, v, *parameters)
    found = [
        checkpoint(part, q, k, v, first, use_reentrant=False, preserve_rng_state=False)
        if recomputed
        else part(q, k, v, first)
        for first in range(0, tokens, rows)
    ]
    lses = [lse for _, lse in found if lse is not None]
    out = torch.cat([out for out, _ in found], dim=2)
    return give_back(out, query), give_back_lse(torch.cat(lses, dim=2) if lses else None, query)
