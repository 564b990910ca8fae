"""Grids cut into blocks: sums over blocks, pairs of blocks that are related, and lists of them.

A grid is cut as `BlockMask` cuts it: from its first token on, blocks short at its far borders, all in C order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..block_sparse.mask import BlockMask, boxes
from ..common.calling import PerAxis, per_axis


def block_lengths(name: str, block: PerAxis[int], rank: int) -> tuple[int, ...]:
    """Tokens of a block along each of `rank` axes.

    Raises:
        ValueError, TypeError: not one positive integer, or one for each axis.
    """
    lengths = per_axis(name, block, rank, int)
    if any(n < 1 for n in lengths):
        raise ValueError(f"{name}={block!r} must be at least 1 token along each axis")
    return lengths


def check_query_key(query: Tensor, key: Tensor) -> int:
    """The number of spatial axes of `query` and `key`, which fit together.

    Raises:
        ValueError: not `[B, 1 to 3 axes, heads, head_dim]` twice, or other batches, head_dims or heads.
    """
    rank = query.dim() - 3
    shapes = f"query.shape={tuple(query.shape)} and key.shape={tuple(key.shape)}"
    if not 1 <= rank <= 3 or key.dim() != query.dim():
        raise ValueError(f"{shapes} must be [B, 1 to 3 spatial axes, heads, head_dim]")
    if query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1] or query.shape[-2] % key.shape[-2]:
        raise ValueError(f"{shapes} must agree in B and head_dim, and heads of key must divide those of query")
    return rank


def check_blocks(
    query: Tensor, key: Tensor, query_block: PerAxis[int], key_block: PerAxis[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of a block of `query` and of `key` along each axis; see `check_query_key` and `block_lengths`."""
    rank = check_query_key(query, key)
    return block_lengths("query_block", query_block, rank), block_lengths("key_block", key_block, rank)


# Sums over blocks


def _by_block(x: Tensor, block: Sequence[int], fill: float) -> Tensor:
    """`[B, *spatial, heads, d]` to `[B, *blocks, *block, heads, d]`, `fill` past the grid."""
    rank, shape = len(block), x.shape[1:-2]
    counts = boxes(shape, block)
    ends = [c * b - n for n, b, c in zip(shape, block, counts, strict=True)]
    if any(ends):
        x = pad(x, [0, 0, 0, 0, *(side for end in reversed(ends) for side in (0, end))], value=fill)
    for axis in reversed(range(rank)):
        x = x.unflatten(1 + axis, (counts[axis], block[axis]))
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1, 2 * rank + 2]
    return x.permute(order)


def block_tokens(shape: Sequence[int], block: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Tokens that exist in every block of a grid, int64 `[blocks]`."""
    total = torch.ones(1, dtype=torch.int64, device=device)
    for n, b, count in zip(shape, block, boxes(shape, block), strict=True):
        along = (n - b * torch.arange(count, device=device)).clamp(max=b)
        total = (total[:, None] * along).flatten()
    return total


def cut_into_blocks(x: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Tokens block by block.

    Returns:
        tokens `[B, blocks, tokens of a block, heads, d]`, zero past the grid.
        exists, bool `[blocks, tokens of a block]`.
    """
    rank, shape = len(block), x.shape[1:-2]
    tokens = _by_block(x, block, 0).flatten(1 + rank, 2 * rank).flatten(1, rank)
    ones = torch.ones((1, *shape, 1, 1), dtype=torch.bool, device=x.device)
    return tokens, _by_block(ones, block, 0).reshape(tokens.shape[1:3])


def block_means(x: Tensor, block: Sequence[int]) -> Tensor:
    """Mean over the tokens that exist in every block, `[B, *spatial, heads, d]` to `[B, blocks, heads, d]`.

    Sums are in float32, in float64 for float64.
    """
    rank, dtype = len(block), torch.promote_types(x.dtype, torch.float32)
    sums = _by_block(x, block, 0).sum(dim=tuple(range(1 + rank, 1 + 2 * rank)), dtype=dtype).flatten(1, rank)
    return sums / block_tokens(x.shape[1:-2], block, x.device)[:, None, None]


def block_extrema(x: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry of every channel of every block, `[B, blocks, heads, d]` each."""
    rank = len(block)
    over = tuple(range(1 + rank, 1 + 2 * rank))
    low, high = (_by_block(x, block, sign * torch.inf) for sign in (1, -1))
    return low.amin(dim=over).flatten(1, rank), high.amax(dim=over).flatten(1, rank)


def spread_blocks(x: Tensor, shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """Give every token what its block has: `[B, blocks, heads, d]` to `[B, *shape, heads, d]`."""
    x = x.unflatten(1, boxes(shape, block))
    for axis, (n, b) in enumerate(zip(shape, block, strict=True)):
        x = x.repeat_interleave(b, dim=1 + axis).narrow(1 + axis, 0, n)
    return x


# Lists


def to_mask(
    kept: Tensor,
    *,
    query_block: int | Sequence[int],
    key_block: int | Sequence[int],
    most: int | None = None,
) -> BlockMask:
    """Write kept pairs of blocks down as lists in ascending order.

    Args:
        kept: bool `[B or 1, heads or 1, query blocks, key blocks]`; leading dimensions may be left out.
        query_block, key_block: tokens of a block along each axis; one number for a grid of one axis.
        most: width of the lists, which no row may exceed: it is not checked on a device, further pairs would be lost.
            None: all key blocks, so that the width never depends on values.
    """
    kept = kept.view((1,) * (4 - kept.dim()) + kept.shape)
    count = kept.shape[-1]
    most = count if most is None else min(most, count)
    numbers = torch.where(kept, torch.arange(count, dtype=torch.int32, device=kept.device), count)
    if 4 * most > count:
        lists = numbers.sort(dim=-1).values[..., :most]
    else:
        lists = numbers.topk(most, dim=-1, largest=False, sorted=True).values
    lists = lists.clamp(max=count - 1)  # ignored entries are numbers of blocks, too
    kv_num = kept.sum(-1, dtype=torch.int32).clamp(max=most)
    lengths = [(x,) if isinstance(x, int) else tuple(x) for x in (query_block, key_block)]
    return BlockMask(lengths[0], lengths[1], kv_num, lists.contiguous())


def static_mask(
    kept: Tensor, query_block: Sequence[int], key_block: Sequence[int], device: torch.device | str | None
) -> BlockMask:
    """`to_mask` of a pattern that is known on the host: lists as long as the longest, then moved to `device`."""
    most = max(1, int(kept.sum(-1).max()))
    return on_device(to_mask(kept, query_block=query_block, key_block=key_block, most=most), device)


def on_device(mask: BlockMask, device: torch.device | str | None) -> BlockMask:
    """The mask with its lists on `device`."""
    if device is None:
        return mask
    bias = None if mask.bias is None else mask.bias.to(device)
    return mask._replace(kv_num=mask.kv_num.to(device), kv_idx=mask.kv_idx.to(device), bias=bias)


def stack_heads(masks: Sequence[BlockMask]) -> BlockMask:
    """One mask of several, head after head; shorter lists are filled up with ignored entries.

    Raises:
        ValueError: no mask, masks of other blocks, or of several heads.
    """
    blocks = {(x.query_block, x.key_block, x.kv_num.shape[-1]) for x in masks}
    if len(blocks) != 1 or any(x.kv_num.shape[1] != 1 for x in masks):
        raise ValueError(f"masks must have one head each and the same blocks, got {sorted(blocks)}")
    most = max(x.kv_idx.shape[-1] for x in masks)
    lists = [pad(x.kv_idx, [0, most - x.kv_idx.shape[-1]]) for x in masks]
    return masks[0]._replace(kv_num=torch.cat([x.kv_num for x in masks], 1), kv_idx=torch.cat(lists, 1))


def density(mask: BlockMask, shape: Sequence[int], key_shape: Sequence[int] | None = None) -> Tensor:
    """Share of the pairs of tokens that a mask keeps, float64 `[B or 1, heads or 1]`, short blocks counted as they are.

    Args:
        shape: the grid of queries.
        key_shape: the grid of keys; that of queries when None.
    """
    key_shape = shape if key_shape is None else key_shape
    device = mask.kv_idx.device
    keys = block_tokens(key_shape, mask.key_block, device)[mask.kv_idx.long()]
    listed = torch.arange(mask.kv_idx.shape[-1], device=device) < mask.kv_num[..., None]
    seen = (keys * listed).sum(-1) * block_tokens(shape, mask.query_block, device)
    return seen.sum(-1).double() / (prod(shape) * prod(key_shape))


# Static relations


def differences(n: int, query_block: int, key_block: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest difference, key less query, of the tokens of pairs of blocks along an axis of n tokens:
    int64 `[query blocks, key blocks]` each. All differences between them occur."""
    first_query, last_query = block_ends(n, query_block, device)
    first_key, last_key = block_ends(n, key_block, device)
    return first_key - last_query[:, None], last_key - first_query[:, None]


def block_ends(n: int, block: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """First and last token of the blocks of an axis of n tokens."""
    first = torch.arange(0, n, block, device=device)
    return first, (first + block).clamp(max=n) - 1


def nearer(n: int, reach: int, query_block: int, key_block: int, device: torch.device | None = None) -> Tensor:
    """Pairs of blocks along an axis in which some query is less than `reach` away from some key, bool."""
    least, most = differences(n, query_block, key_block, device)
    return (least < reach) & (most > -reach)


def outer_and(relations: Sequence[Tensor]) -> Tensor:
    """Pairs of blocks that are related along every axis: bool `[n_i, m_i]` an axis to bool `[blocks, key blocks]`."""
    kept = relations[0]
    for x in relations[1:]:
        rows, columns = kept.shape[0] * x.shape[0], kept.shape[1] * x.shape[1]
        kept = (kept[:, None, :, None] & x[None, :, None, :]).reshape(rows, columns)
    return kept


def _axis_lists(relation: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the related columns of every row, ascending, and which of them count: `[n, widest]` each."""
    number, m = relation.sum(1), relation.shape[1]
    columns = torch.where(relation, torch.arange(m), m).sort(1).values[:, : max(1, int(number.max()))]
    return columns.clamp(max=m - 1), torch.arange(columns.shape[1]) < number[:, None]


def product_mask(
    relations: Sequence[Tensor],
    *,
    query_block: Sequence[int],
    key_block: Sequence[int],
    where: Callable[[list[Tensor], list[Tensor]], Tensor] | None = None,
    device: torch.device | str | None = None,
) -> BlockMask:
    """The mask of blocks that are related along every axis, without a matrix of all pairs of blocks.

    Args:
        relations: for every axis bool `[query blocks, key blocks]` along it, on the host.
        query_block, key_block: tokens of a block along each axis.
        where: a further test of pairs, given the block coordinates of queries `[query blocks, 1]` and of keys
            `[query blocks, listed]`, one tensor an axis.
        device: of the lists.
    """
    rank = len(relations)
    lists = [_axis_lists(x) for x in relations]

    def place(x: Tensor, axis: int) -> Tensor:  # [n, w] to [1, …, n, …, 1, …, w, …]
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = x.shape
        return x.view(shape)

    widths = [x.shape for x, _ in lists]
    full = [n for n, _ in widths] + [w for _, w in widths]
    number = torch.zeros(full, dtype=torch.int64)
    there = torch.ones(full, dtype=torch.bool)
    for axis, (columns, listed) in enumerate(lists):
        number = number * relations[axis].shape[1] + place(columns, axis)
        there = there & place(listed, axis)
    number, there = (x.flatten(rank).flatten(0, rank - 1) for x in (number, there))  # [query blocks, listed]
    if where is not None:
        counts = [x.shape[0] for x in relations], [x.shape[1] for x in relations]
        queries = list(torch.unravel_index(torch.arange(number.shape[0])[:, None], tuple(counts[0])))
        there = there & where(queries, list(torch.unravel_index(number, tuple(counts[1]))))
    total = prod([x.shape[1] for x in relations])
    kv_num = there.sum(1, dtype=torch.int32)
    kv_idx = torch.where(there, number, total).sort(1).values[:, : max(1, int(kv_num.max()))].clamp(max=total - 1)
    mask = BlockMask(tuple(query_block), tuple(key_block), kv_num[None, None], kv_idx.to(torch.int32)[None, None])
    return on_device(mask, device)


def own_blocks(
    shape: Sequence[int], query_block: Sequence[int], key_block: Sequence[int], device: torch.device | None = None
) -> Tensor:
    """Pairs of blocks of one grid that share a token, bool `[query blocks, key blocks]`."""
    relations = []
    for n, b, c in zip(shape, query_block, key_block, strict=True):
        q, k = (torch.arange(-(-n // size), device=device) for size in (b, c))
        first, last = q[:, None] * b, (q[:, None] * b + b).clamp(max=n) - 1
        relations.append((first // c <= k) & (k <= last // c))
    return outer_and(relations)


def own_or_none(
    query: Tensor, key: Tensor, query_block: Sequence[int], key_block: Sequence[int], own: bool = True
) -> Tensor | None:
    """`own_blocks` of queries that attend to their own grid; None in cross-attention, and where `own` is False."""
    shape = query.shape[1:-2]
    return own_blocks(shape, query_block, key_block, query.device) if own and shape == key.shape[1:-2] else None


def most_own(query_block: Sequence[int], key_block: Sequence[int]) -> int:
    """A bound on the blocks of keys that share a token with a block of queries."""
    same = tuple(query_block) == tuple(key_block)
    return 1 if same else prod([(b + c - 2) // c + 1 for b, c in zip(query_block, key_block, strict=True)])
