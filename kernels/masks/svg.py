"""Sparse VideoGen (arXiv:2502.01776): spatial heads see a few frames, temporal heads the same places in all frames."""

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor

from ..block_sparse.mask import BlockMask
from ..common.calling import resolve_scale, without_autocast
from .blocks import check_query_key, nearer, outer_and, static_mask, to_mask
from .registry import published

Head = Literal["spatial", "temporal"]
HEADS: tuple[Head, Head] = ("spatial", "temporal")


def _reach(shape: Sequence[int], width: float, head: Head, round_to: int) -> int:
    """How far apart a query and a key are less than: in raster order, or inside the frame."""
    frames, tokens = shape
    if head == "spatial":
        return max(1, int(width * tokens) // round_to * round_to)
    return max(1, int(width * tokens) // frames)


def _pairs(
    shape: Sequence[int],
    head: Head,
    width: float,
    block: int,
    round_to: int,
    first_frame: bool,
    device: torch.device | None = None,
) -> Tensor:
    """Pairs of blocks in which a query sees a key, bool `[blocks, blocks]`."""
    frames, tokens = shape
    reach = _reach(shape, width, head, round_to)
    if head == "temporal":
        inside = nearer(tokens, reach, block, block, device)
        return outer_and([torch.ones(frames, frames, dtype=torch.bool, device=device), inside])
    starts = torch.arange(0, tokens, block, device=device)
    first = (torch.arange(frames, device=device)[:, None] * tokens + starts).flatten()
    last = torch.minimum(first + block, (first // tokens + 1) * tokens) - 1
    near = torch.maximum(first - last[:, None], first[:, None] - last) < reach
    return near | (first < tokens) if first_frame else near


@published(paper="2502.01776", density="width", exact="exact for block=1, else each block that is touched")
def svg(
    shape: Sequence[int],
    *,
    head: Head | Sequence[Head] = "spatial",
    width: float = 2,
    block: int = 128,
    round_to: int = 128,
    first_frame: bool = False,
    device: torch.device | str | None = None,
) -> BlockMask:
    """The two patterns of Sparse VideoGen. A spatial head sees keys less than `width` frames away in raster order
    (rounded down to `round_to` tokens), a temporal head those less than `width * tokens / T` places away inside the
    frame, in all frames. `svg_online` chooses between them.

    Args:
        shape: `(T, H, W)` or `(T, tokens of a frame)`; the mask is one of the grid flattened in space,
            `query.flatten(2, 3)`.
        head: one pattern, or one for each head.
        width: in frames; at T everything is seen.
        block: tokens of a block, within a frame.
        round_to: tokens.
        first_frame: whether spatial heads see the first frame, too.
        device: of the lists; the host when None.

    Raises:
        ValueError: an argument outside what is accepted.
    """
    shape = (shape[0], prod(shape[1:])) if len(shape) == 3 else shape
    heads: list[Head] = [head] if isinstance(head, str) else list(head)
    if len(shape) != 2 or not heads or any(x not in HEADS for x in heads):
        raise ValueError(f"shape={tuple(shape)} must be (T, tokens), head={head!r} 'spatial', 'temporal' or a list")
    if width <= 0 or min(block, round_to) < 1:
        raise ValueError(f"width={width!r} must be positive, block={block!r} and round_to={round_to!r} at least 1")
    kept = torch.stack([_pairs(shape, x, width, block, round_to, first_frame) for x in heads])
    return static_mask(kept, (1, block), (1, block), device)


@published(paper="2502.01776", density="width", exact="exact for block=1, else each block that is touched")
@torch.no_grad()
def svg_online(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    width: float = 2,
    block: int = 128,
    round_to: int = 128,
    first_frame: bool = False,
    samples: int = 64,
    scale: float | None = None,
) -> BlockMask:
    """Sparse VideoGen's choice: every head takes the pattern whose output is nearer to dense attention, by the squared
    error over a few queries.

    Args:
        query, key, value: `[B, T, tokens of a frame, heads, d]` of one grid.
        samples: queries, evenly spaced; the official code draws them.
        scale: factor on query . key; d ** -0.5 when None.
        width, block, round_to, first_frame: see `svg`.

    Raises:
        ValueError: an argument outside what is accepted.
    """
    if check_query_key(query, key) != 2 or query.shape[1:3] != key.shape[1:3]:
        raise ValueError(f"query.shape={tuple(query.shape)}, key.shape={tuple(key.shape)} must be of one (T, tokens)")
    shape, heads = tuple(query.shape[1:3]), query.shape[-2]
    frames, tokens = shape
    number = torch.arange(frames * tokens, device=query.device)
    rows = torch.linspace(0, frames * tokens - 1, min(samples, frames * tokens), device=query.device).long()
    near = (rows[:, None] - number).abs() < _reach(shape, width, "spatial", round_to)
    near = near | ((number < tokens) & first_frame)
    inside = (rows[:, None] % tokens - number % tokens).abs() < _reach(shape, width, "temporal", round_to)
    dtype, group = torch.promote_types(query.dtype, torch.float32), heads // key.shape[-2]
    k, v = (x.flatten(1, 2).to(dtype).repeat_interleave(group, dim=-2).transpose(1, 2) for x in (key, value))
    with without_autocast(query.device):
        q = query.flatten(1, 2)[:, rows].to(dtype).transpose(1, 2)  # [B, heads, samples, d]
        logits = q @ k.mT * resolve_scale(query, scale)
        dense, *sparse = (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v for seen in (near | True, near, inside))
    errors = [(x - dense).square().mean((-2, -1)) for x in sparse]
    spatial = (errors[0] <= errors[1])[..., None, None]  # [B, heads, 1, 1]
    kept = [_pairs(shape, x, width, block, round_to, first_frame, query.device) for x in HEADS]
    return to_mask(torch.where(spatial, *kept), query_block=(1, block), key_block=(1, block))
