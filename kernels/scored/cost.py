"""What scored attention costs."""

from __future__ import annotations

from math import prod

from torch import Tensor

from ..common.launching import cdiv
from .call import ScoredCall, passes, products
from .chunked import chunk_rows
from .configs import COPE_KEYS
from .score import CLASSES


def summarize(
    query: Tensor, key: Tensor, value: Tensor, call: ScoredCall, impl: str | None
) -> dict[str, int | float | str]:
    """Quantities of a call for `explain`: the score, its class and kernel, pairs, products and the logits in memory.

    Of CoPE the kernels keep two numbers per query and tile of keys in the backward pass.
    """
    score = call.score
    batch, heads = query.shape[0], query.shape[-2]
    queries, keys = prod(query.shape[1:-2]), prod(key.shape[1:-2])
    pairs = batch * heads * queries * keys
    chunked = impl == "torch" and score.by_rows
    rows = min(queries, chunk_rows(batch, heads, keys)) if chunked else queries
    held = batch * heads * rows * keys * max(4, query.itemsize)
    forward, backward = products(query, key, value, getattr(score, "r", None))
    read = sum(x.numel() * x.itemsize for x in (query, key, value))
    made = batch * queries * heads * (value.shape[-1] * query.itemsize + 4)  # output and log-sum-exp
    kernel = "none: PyTorch"
    if impl == "triton":
        sweeps = len(passes(score.fused, getattr(score, "power", 0.0)))
        kernel = f"{score.fused}, keys read {'once' if sweeps == 1 else 'twice'} in the forward pass"
        held = (
            2 * 4 * batch * heads * queries * cdiv(keys, COPE_KEYS[min(4, query.itemsize)])
            if score.fused == "cope"
            else 0
        )
    return {
        "score": type(score).__name__,
        "fusibility": f"{score.fusibility}: {CLASSES[score.fusibility]}",
        "kernel": kernel,
        "pairs": pairs,
        "forward_flops": forward,
        "backward_flops": backward,
        "forward_bytes": read + made,
        "backward_bytes": 2 * read + 2 * made,  # operands, outputs and their gradients, once each
        "logits_held_bytes": held,
    }
