"""The definition: all logits at once."""

from torch import Tensor

from .call import ScoredCall, give_back, give_back_lse, lay_out, rows_of


def attend(query: Tensor, key: Tensor, value: Tensor, call: ScoredCall) -> tuple[Tensor, Tensor | None]:
    """Output `[B, *spatial, heads, value_dim]`, and log-sum-exp `[B, *spatial, heads]` or None."""
    q, k, v = lay_out(query, key, value)
    out, lse = call.score.attend(rows_of(q, k, v, call.mask, call.scale, 0, q.shape[2]))
    return give_back(out, query), give_back_lse(lse, query)
