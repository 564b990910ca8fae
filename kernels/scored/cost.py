"""What scored attention costs."""

from __future__ import annotations

from math import prod

from torch import Tensor

from .chunked import chunk_rows
from .columns import ColumnMask
from .score import CLASSES, Score


def summarize(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    impl: str | None,
    score: Score,
    mask: ColumnMask | None = None,
    order: Tensor | None = None,
    scale: float | None = None,
) -> dict[str, int | float | str]:
    """Quantities of a call for `explain`: the score, its class, pairs, products and the logits in memory."""
    batch, heads = query.shape[0], query.shape[-2]
    queries, keys = prod(query.shape[1:-2]), prod(key.shape[1:-2])
    pairs = batch * heads * queries * keys
    chunked = impl == "torch" and score.by_rows
    rows = min(queries, chunk_rows(batch, heads, keys)) if chunked else queries
    itemsize = max(4, query.itemsize)
    return {
        "score": type(score).__name__,
        "fusibility": f"{score.fusibility}: {CLASSES[score.fusibility]}",
        "pairs": pairs,
        "forward_flops": 2 * pairs * (query.shape[-1] + value.shape[-1]),
        "logits_held_bytes": batch * heads * rows * keys * itemsize,
    }
