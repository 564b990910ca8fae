"""VMoBA (arXiv:2506.23858): MoBA on chunks in time, in space and in both, by layer, with thresholds of mass."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..block_sparse.mask import BlockMask
from ..common.calling import PerAxis
from .blocks import block_lengths, block_means, check_query_key, most_own, own_or_none, to_mask
from .registry import published
from .select import keep, pair_scores

Scope = Literal["query_head", "block", "head_global", "overall"]
SCOPES = ("query_head", "block", "head_global", "overall")


def vmoba_block(
    shape: Sequence[int],
    layer: int,
    *,
    temporal: int,
    spatial: tuple[int, int],
    cube: tuple[int, int, int],
    cycle: tuple[int, int, int] = (1, 1, 1),
) -> tuple[int, int, int]:
    """The chunk of a layer: in turn `cycle[0]` layers whole frames, `cycle[1]` columns through all frames, `cycle[2]`
    cubes.

    Args:
        shape: (T, H, W).
        temporal: frames of a chunk.
        spatial: rows and columns of a chunk.
        cube: frames, rows and columns of a chunk. Official for 20 × 30 × 52: 2, (3, 4), (4, 6, 4).
    """
    place = layer % sum(cycle)
    if place < cycle[0]:
        return temporal, shape[1], shape[2]
    return (shape[0], *spatial) if place < cycle[0] + cycle[1] else cube


def _arrange(x: Tensor, scope: Scope) -> Tensor:
    """`[B, heads, queries, chunks]` with what is ranked together in the last dimension."""
    if scope == "query_head":
        return x
    if scope == "block":
        return x.permute(0, 3, 1, 2).flatten(2)
    x = x.transpose(0, 1).flatten(1)  # [heads, B * queries * chunks]
    return x if scope == "head_global" else x.flatten()[None]


def _arrange_back(x: Tensor, shape: torch.Size, scope: Scope) -> Tensor:
    batch, heads, queries, chunks = shape
    if scope == "query_head":
        return x
    if scope == "block":
        return x.view(batch, chunks, heads, queries).permute(0, 2, 3, 1)
    return x.view(heads, batch, queries, chunks).transpose(0, 1)


def _beyond_threshold(gate: Tensor, own: Tensor, threshold: float, scope: Scope) -> Tensor:
    """Chunks besides the own ones until their share of the scaled gates, with that of the own ones, is `threshold`."""
    x, mine = (_arrange(t, scope) for t in (gate, own.expand(gate.shape)))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    x = (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)
    total = x.sum(-1, keepdim=True) + 1e-6
    wanted = (threshold - (x * mine).sum(-1, keepdim=True) / total).clamp(min=0)
    ranked, order = x.masked_fill(mine, 0).sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    chosen = (before / total < wanted) | (torch.arange(x.shape[-1], device=x.device) == 0)  # one at least
    return _arrange_back(torch.zeros_like(mine).scatter(-1, order, chosen) & ~mine, gate.shape, scope)


@published(paper="2506.23858", density="topk or threshold", exact="exact for query_block=1")
@torch.no_grad()
def vmoba(
    query: Tensor,
    key: Tensor,
    *,
    block: PerAxis[int],
    topk: int | None = None,
    threshold: float | None = None,
    scope: Scope = "query_head",
    query_block: PerAxis[int] = 1,
) -> BlockMask:
    """Video mixture of block attention: chunks by query times mean key, the own chunk always.

    With `topk`, the `topk` highest of every query and head, or as many on average over all queries of a head
    ("head_global") or of all heads ("overall"). With `threshold`, gates are scaled to [0, 1] within the scope, and the
    highest besides the own chunks are taken, one at least, until all have the share `threshold`. These two scopes rank
    the whole batch together, as the official code does.

    Args:
        query, key: `[B, *spatial, heads, d]`, key of the same grid.
        block: tokens of a chunk along each axis; see `vmoba_block`. Chunks of a fraction of a frame are chunks of the
            flattened grid.
        topk: at least 1.
        threshold: in [0, 1]. Official: 0.25, "query_head".
        scope: "query_head", "head_global", "overall", or with `threshold` "block", all queries and heads of a chunk.
        query_block: tokens along each axis of a block of queries that share one list, by their mean query. 1 is the
            published selection; blocks run several times faster.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    rank = check_query_key(query, key)
    if (topk is None) == (threshold is None):
        raise ValueError(f"topk={topk!r} and threshold={threshold!r}: give one of them")
    if scope not in SCOPES or (scope == "block" and topk is not None):
        raise ValueError(f"scope={scope!r} must be one of {SCOPES}, 'block' with threshold only")
    block, query_block = block_lengths("block", block, rank), block_lengths("query_block", query_block, rank)
    own = own_or_none(query, key, query_block, block)
    if own is None:
        raise ValueError(f"key.shape={tuple(key.shape)} must have the grid of query.shape={tuple(query.shape)}")
    gate = pair_scores(block_means(query, query_block), block_means(key, block), scale=1.0)  # [B, heads, rows, chunks]
    if threshold is not None:
        kept = _beyond_threshold(gate, own, threshold, scope) | own
        return to_mask(kept, query_block=query_block, key_block=block)
    assert topk is not None
    gate = gate.masked_fill(own, torch.inf)
    if scope == "query_head":
        most = topk + most_own(query_block, block) - 1
        return to_mask(keep(gate, rule="topk", topk=topk) | own, query_block=query_block, key_block=block, most=most)
    together = gate.transpose(0, 1).flatten(1, 2)[None]  # [1, heads, B * rows, chunks]
    kept = keep(together, rule="topk", topk=topk, scope="head" if scope == "head_global" else "all", least=0)
    kept = kept[0].unflatten(1, (gate.shape[0], -1)).transpose(0, 1) | own
    return to_mask(kept, query_block=query_block, key_block=block)
