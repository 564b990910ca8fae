"""Maps of words refined by self-attention: spread along it, or smooth on its graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def spread(maps: Tensor, attend: Callable[[Tensor], Tensor], *, rounds: int = 5, keep: float = 0.5) -> Tensor:
    """`m <- keep m + (1 - keep) A m`, a few times: pixels take over what they attend to (ViMAEdit).

    Args:
        maps: `[B, tokens, words]`.
        attend: `A m`, the mean over layers and heads of self-attention to `m` as values.
        rounds: how often.
        keep: share of the map itself; 1 leaves it.
    """
    for _ in range(rounds):
        maps = keep * maps + (1 - keep) * attend(maps)
    return maps


def attend_mean(operations: Sequence[tuple[Tensor, Tensor, float]]) -> Callable[[Tensor], Tensor]:
    """`A m` for the mean map `A` of several self-attentions, by one attention call each and without a map.

    Args:
        operations: queries `[B, tokens, heads, d]`, keys, and factor on their products.
    """

    def attend(maps: Tensor) -> Tensor:
        total = torch.zeros_like(maps)
        for query, key, scale in operations:
            value = maps.to(query)[:, None].expand(-1, query.shape[2], -1, -1)
            out = torch.nn.functional.scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value, scale=scale
            )
            total = total + out.mean(1).to(maps)
        return total / len(operations)

    return attend


def smooth_on_graph(maps: Tensor, self_map: Tensor, *, slope: float = 4.0, center: float = 0.5, weight: float = 0.5):
    """Solves `(diag(w²) + weight L) x = diag(w²) m` with `w = sigmoid(slope (m - center))` (LOCATEdit).

    `L = D - (A + A.T) / 2` is the Laplacian of the self-attention map. The system is symmetric and positive definite:
    Cholesky, in float64.

    Args:
        maps: m, `[B, tokens]`.
        self_map: A, mean over layers and heads, `[B, tokens, tokens]`; at most 32 x 32 tokens are sensible.
        slope, center: of the confidence w.
        weight: of the Laplacian; 0 leaves m.

    Returns:
        `[B, tokens]` in the dtype of maps, between the lowest and the highest of m.
    """
    m, graph = maps.double(), self_map.double()
    graph = (graph + graph.mT) / 2
    laplacian = torch.diag_embed(graph.sum(-1)) - graph
    confidence = torch.sigmoid(slope * (m - center)).square()
    system = torch.diag_embed(confidence) + weight * laplacian
    solved = torch.cholesky_solve((confidence * m)[..., None], torch.linalg.cholesky(system))
    return solved[..., 0].to(maps.dtype)
