"""Window attention in plain PyTorch: batched products over stretches of equal shape, no masks."""

from itertools import product

import torch
from torch import Tensor

from .geometry import Axis, runs


def _stretches(x: Tensor, cuts: tuple[tuple[int, int, int, int], ...]) -> Tensor:
    """Boxes of `[B, *spatial, heads, d]` as `[B, *counts, heads, *sizes, d]`; a cut is (count, first, size, step)."""
    rank = len(cuts)
    for axis, (count, first, size, step) in enumerate(cuts, 1):
        x = x.narrow(axis, first, (count - 1) * step + size)
        x = x.unfold(axis, size, step)  # [B, …, counts, …, heads, d, *sizes]
    order = (*range(rank + 2), *range(rank + 3, 2 * rank + 3), rank + 2)
    return x.permute(order)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, axes: tuple[Axis, ...], scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, head_dim]` and natural log-sum-exp `[B, *spatial, heads]`; see the public op."""
    rank, (heads, key_heads, d) = len(axes), (query.shape[-2], *key.shape[-2:])
    accumulate = torch.promote_types(query.dtype, torch.float32)
    sizes = tuple(a.window for a in axes), tuple(a.span for a in axes)
    table = None if bias is None else bias.to(accumulate).reshape(heads, *sizes[0], *sizes[1])
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=accumulate)
    for combination in product(*map(runs, axes)):
        pairs = tuple(zip(combination, axes, strict=True))
        q = _stretches(query, tuple((r.count, r.query, r.queries, a.window) for r, a in pairs)).to(accumulate)
        k, v = (
            _stretches(x, tuple((r.count, r.key, r.keys, a.window) for r, a in pairs))
            .to(accumulate)
            .repeat_interleave(heads // key_heads, dim=rank + 1)
            .flatten(rank + 2, -2)
            for x in (key, value)
        )  # [B, *counts, heads, keys, d]
        logits = q.flatten(rank + 2, -2) @ k.transpose(-1, -2) * scale
        if table is not None:
            block = table
            for axis, r in enumerate(combination, 1):
                block = block.narrow(axis, r.slot, r.queries).narrow(axis + rank, r.key_slot, r.keys)
            logits = logits + block.flatten(1 + rank).flatten(1, rank)
        counts, inner = [r.count for r in combination], [r.queries for r in combination]
        block_out = (logits.softmax(-1) @ v).unflatten(-2, inner)  # [B, *counts, heads, *sizes, d]
        block_lse = logits.logsumexp(-1).unflatten(-1, inner)
        where = (slice(None), *(slice(r.query, r.query + (r.count - 1) * a.window + r.queries) for r, a in pairs))
        order = [0, *(i for a in range(rank) for i in (1 + a, rank + 2 + a)), rank + 1]
        shape = [c * n for c, n in zip(counts, inner, strict=True)]
        out[where] = block_out.permute(*order, 2 * rank + 2).reshape(-1, *shape, heads, d).to(query.dtype)
        lse[where] = block_lse.permute(order).reshape(-1, *shape, heads)
    return out, lse
