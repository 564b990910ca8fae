"""DuoAttention (arXiv:2410.10819): heads that retrieve are dense, the others see the start and their neighbours."""

from collections.abc import Sequence

import torch

from ..block_sparse.mask import BlockMask
from ..common.calling import PerAxis, per_axis
from .blocks import block_lengths, cover, outer_and, static_mask
from .registry import published


@published(paper="2410.10819", density="recent", exact="exact for block=1, else each block that is touched")
def duo(
    shape: Sequence[int],
    *,
    recent: PerAxis[int],
    sink: int = 0,
    retrieval: Sequence[bool] = (False,),
    causal: bool = False,
    block: PerAxis[int] = 8,
    device: torch.device | str | None = None,
) -> BlockMask:
    """Streaming heads see keys less than `recent` away along each axis, and those before `sink` along the first axis
    (registers, the first frame); retrieval heads see everything. `gated` and `plan_by_gates` find which are which.

    Args:
        shape: tokens of the grid along each axis.
        recent: tokens along each axis.
        sink: tokens (or frames) at the start of the first axis.
        retrieval: a flag for each head, or one for all.
        causal: one axis only: keys that follow are dropped (with blocks, those of later blocks).
        block: tokens of a block along each axis.
        device: of the lists; the host when None.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    rank = len(shape)
    block, spans = block_lengths("block", block, rank), per_axis("recent", recent, rank, int)
    if min(spans) < 1 or (causal and rank != 1):
        raise ValueError(
            f"recent={recent!r} must be at least 1, and causal={causal} needs one axis, shape={tuple(shape)}"
        )
    places = [torch.arange(n) for n in shape]
    near = [(x[:, None] - x).abs() < span for x, span in zip(places, spans, strict=True)]
    ends = [sink, *(len(x) for x in places[1:])]
    start = [(x[:, None] >= 0) & (x < end) for x, end in zip(places, ends, strict=True)]
    if causal:
        before = places[0] <= places[0][:, None]
        near[0], start[0] = near[0] & before, start[0] & before
    lift = [[cover(x, b, b) for x, b in zip(part, block, strict=True)] for part in (near, start)]
    streaming = outer_and(lift[0]) | outer_and(lift[1])
    everything = torch.ones_like(streaming)
    if causal:
        everything = cover(places[0] <= places[0][:, None], block[0], block[0])
    kept = torch.stack([everything if flag else streaming for flag in retrieval])
    return static_mask(kept, block, block, device)
