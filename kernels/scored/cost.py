"""What scored attention costs."""

from __future__ import annotations

from math import prod

from torch import Tensor

from .call import ScoredCall
from .chunked import chunk_rows
from .score import CLASSES


def summarize(
    query: Tensor, key: Tensor, value: Tensor, call: ScoredCall, impl: str | None
) -> dict[str, int | float | str]:
    """Quantities of a call for `explain`: the score, its class, pairs, products and the logits in memory."""
    score = call.score
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
