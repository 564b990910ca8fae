"""Two-level selection: frames first, then blocks inside them."""

import torch
from torch import Tensor

from ..block_sparse.mask import BlockMask, boxes
from ..common.calling import PerAxis
from .blocks import block_lengths, block_means, check_query_key, own_or_none, to_mask
from .registry import published
from .select import keep, pair_scores


def sparsity_schedule(chunk: int, chunks: int, *, first: float = 0.0, last: float = 0.9) -> float:
    """Sparsity of a chunk of a causal rollout, from `first` to `last` along a straight line: errors of early chunks
    reach all that follow.

    Raises:
        ValueError: a chunk outside [0, chunks).
    """
    if not 0 <= chunk < chunks:
        raise ValueError(f"chunk={chunk!r} must lie in [0, {chunks})")
    return first + (last - first) * chunk / max(1, chunks - 1)


@published(paper="", density="frames, topk", exact="ours: the formulas of its papers are not public")
@torch.no_grad()
def two_level(
    query: Tensor,
    key: Tensor,
    *,
    frames: int = 4,
    topk: int = 16,
    block: PerAxis[int] = (1, 8, 8),
    first_frame: bool = True,
    own: bool = True,
) -> BlockMask:
    """Slabs of `block[0]` frames are ranked by mean query times mean key, for every slab of queries; of the best
    `frames` slabs every block of queries keeps its `topk` blocks. Scores of blocks in other slabs play no part.

    Args:
        query, key: `[B, *spatial, heads, d]`, `[B, *key_spatial, key_heads, d]`; the first axis is time.
        frames: slabs of keys that a slab of queries chooses from, its own and the first (`first_frame`) besides.
        topk: blocks.
        block: tokens of a block along each axis.
        first_frame: whether blocks of the first slab can always be chosen.
        own: keep the own block besides.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    rank = check_query_key(query, key)
    block = block_lengths("block", block, rank)
    slab = (block[0], *key.shape[2:-2]), (block[0], *query.shape[2:-2])
    scale = query.shape[-1] ** -0.5
    coarse = pair_scores(block_means(query, slab[1]), block_means(key, slab[0]), scale=scale)
    number = torch.arange(coarse.shape[-1], device=query.device)
    always = (number == 0) if first_frame else (number < 0)
    if query.shape[1] == key.shape[1]:
        always = always | (number == number[:, None])
    chosen = keep(coarse, rule="topk", topk=frames, always=always)
    counts = [boxes(x.shape[1:-2], block) for x in (query, key)]
    inside = [torch.Size(x).numel() // x[0] for x in counts]
    allowed = chosen.repeat_interleave(inside[0], dim=2).repeat_interleave(inside[1], dim=3)
    scores = pair_scores(block_means(query, block), block_means(key, block), scale=scale)
    near = own_or_none(query, key, block, block, own)
    kept = keep(scores, rule="topk", topk=topk, allowed=allowed, always=near)
    return to_mask(kept, query_block=block, key_block=block, most=topk + 1)
