"""DuoAttention (arXiv:2410.10819): heads that retrieve are dense, the others see the start and their neighbours."""

from collections.abc import Sequence

import torch

from ..block_sparse.mask import BlockMask
from ..common.calling import PerAxis, per_axis
from .blocks import block_ends, block_lengths, differences, nearer, outer_and, static_mask
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
    near = [nearer(n, span, b, b) for n, span, b in zip(shape, spans, block, strict=True)]
    streaming, start = outer_and(near), block_ends(shape[0], block[0])[0] < sink
    streaming = streaming | start.repeat_interleave(streaming.shape[1] // len(start))
    everything = torch.ones_like(streaming)
    if causal:
        least, most = differences(shape[0], block[0], block[0])
        everything = least <= 0
        streaming = everything & (start | (most > -spans[0]))
    kept = torch.stack([everything if flag else streaming for flag in retrieval])
    return static_mask(kept, block, block, device)
