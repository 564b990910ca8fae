"""S2 attention (arXiv:2407.17678): every head has a shard of the context of its own, beside what is local."""

from collections.abc import Sequence
from math import prod

import torch

from ..block_sparse.mask import BlockMask, boxes
from ..common.calling import PerAxis, per_axis
from .blocks import block_lengths, static_mask
from .registry import published
from .select import static_blocks


@published(paper="2407.17678", density="stride")
def s2(
    shape: Sequence[int],
    *,
    heads: int,
    stride: PerAxis[int],
    local: PerAxis[int] = 1,
    block: PerAxis[int] = 8,
    device: torch.device | str | None = None,
) -> BlockMask:
    """Heterogeneous context sharding: a head keeps blocks less than `local` away and every `stride`-th block along
    each axis; heads count from different blocks (a mixed radix of the strides), so that together they see everything.

    Args:
        shape: tokens of the grid along each axis.
        heads: of queries, at least the product of strides: fewer would leave blocks that no head sees, as the official
            code does.
        stride, local: in blocks, along each axis.
        block: tokens of a block along each axis.
        device: of the lists; the host when None.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    strides = per_axis("stride", stride, len(shape), int)
    if heads < prod(strides):
        raise ValueError(f"heads={heads} must be at least {prod(strides)}, the product of stride={stride!r}")
    block = block_lengths("block", block, len(shape))
    kept = static_blocks(shape, block, "local_stride", heads=heads, stride=stride, local=local)
    return static_mask(kept, block, block, device)


@published(paper="2407.17678", density="stride")
def s2_causal(
    shape: Sequence[int],
    *,
    heads: int,
    stride: int,
    local: int,
    key_heads: int | None = None,
    dense_heads: int = 0,
    offset: int = 0,
    block: int = 64,
    device: torch.device | str | None = None,
) -> BlockMask:
    """The published causal form in one dimension: query block p keeps key block c <= p if p - c < `local` or
    `(c + key head * max(1, stride // heads) + offset) % stride == 0`.

    Tokens inside the own block are not ordered by lists: a causal window attends to that block.

    Args:
        shape: `(tokens,)`.
        heads: of queries.
        stride, local: in blocks.
        key_heads: heads of keys, a divisor of `heads`; they decide the shard. None: `heads`.
        dense_heads: key heads, the last, that keep all blocks.
        offset: in blocks.
        block: tokens of a block.
        device: of the lists; the host when None.

    Raises:
        ValueError: an argument outside what is accepted.
    """
    key_heads = heads if key_heads is None else key_heads
    if len(shape) != 1 or heads % key_heads or not 0 <= dense_heads <= key_heads or min(stride, local) < 1:
        raise ValueError(
            f"shape={tuple(shape)} must have one axis, key_heads={key_heads} divide heads={heads}, "
            f"dense_heads={dense_heads} lie in [0, key_heads], stride={stride} and local={local} be at least 1"
        )
    (count,) = boxes(shape, (block,))
    number, head = torch.arange(count), torch.arange(key_heads)[:, None]
    shard = (number + head * max(1, stride // heads) + offset) % stride == 0  # [key_heads, blocks]
    near = number[:, None] - number < local
    kept = near | (shard | (head >= key_heads - dense_heads))[:, None]
    kept = (kept & (number <= number[:, None])).repeat_interleave(heads // key_heads, dim=0)
    return static_mask(kept, (block,), (block,), device)


@published(paper="2407.17678", density="stride")
def s2_relative(
    shape: Sequence[int],
    *,
    stride: int,
    local: int,
    block: int = 64,
    device: torch.device | str | None = None,
) -> BlockMask:
    """The published form without order, the same for all heads: blocks less than `local` away, and every `stride`-th
    from there on in both directions.

    Args:
        shape: `(tokens,)`.
        stride, local: in blocks.
        block: tokens of a block.
        device: of the lists; the host when None.

    Raises:
        ValueError: an argument outside what is accepted.
    """
    if len(shape) != 1 or min(stride, local) < 1:
        raise ValueError(f"shape={tuple(shape)} must have one axis, stride={stride} and local={local} be at least 1")
    (count,) = boxes(shape, (block,))
    number = torch.arange(count)
    beyond = ((number[:, None] - number).abs() - local + 1).clamp(min=0)
    return static_mask(beyond % stride == 0, (block,), (block,), device)
