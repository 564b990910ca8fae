"""MoA (arXiv:2406.14909): a band per head whose span grows with the length, beside the first block."""

from collections.abc import Sequence
from math import prod

import torch

from ..block_sparse.mask import BlockMask
from .blocks import static_mask
from .registry import published
from .select import static_blocks


@published(paper="2406.14909", density="alpha, beta")
def moa(
    shape: Sequence[int],
    *,
    alpha: float | Sequence[float],
    beta: float | Sequence[float] = 0.0,
    first: int = 1,
    causal: bool = False,
    block: int = 64,
    device: torch.device | str | None = None,
) -> BlockMask:
    """Mixture of attention spans: blocks less than `max(1, int(alpha // block + beta * tokens / block))` away, and the
    first blocks, which see and are seen by everybody.

    Args:
        shape: tokens of the grid along each axis. Bands are of the flattened grid: `query.flatten(1, -3)`.
        alpha, beta: span = alpha + beta * tokens; one of each, or one a head. `plan_by_influence` finds them.
        first: blocks at the start.
        causal: drops key blocks that follow. Tokens inside the own block are not ordered by lists.
        block: tokens of a block.
        device: of the lists; the host when None.

    Raises:
        ValueError: spans of unequal numbers of heads.
    """
    tokens = prod(shape)
    alphas, betas = ([x] if isinstance(x, (int, float)) else list(x) for x in (alpha, beta))
    if 1 not in (len(alphas), len(betas)) and len(alphas) != len(betas):
        raise ValueError(f"alpha has {len(alphas)} heads and beta {len(betas)}: give one of each, or one a head")
    heads = max(len(alphas), len(betas))
    alphas, betas = (x * heads if len(x) == 1 else x for x in (alphas, betas))
    bands = [max(1, int(a // block + b * tokens / block)) for a, b in zip(alphas, betas, strict=True)]
    options = {"first": first, "causal": causal}
    kept = [static_blocks((tokens,), block, "band_global", band=band, **options) for band in bands]
    return static_mask(torch.cat(kept), (block,), (block,), device)
