"""Lists of key blocks per query block; the only place that knows how a grid is cut into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.symbolic import ceil_div, known, modulo


class BlockMask(NamedTuple):
    """For every block of queries, a list of the blocks of keys it attends to.

    A grid is cut into blocks from its first token on; blocks at its far borders are cut short where the grid does not
    divide. Blocks, and the tokens inside a block, are numbered in C order, the last axis fastest. Tokens of a block are
    numbered in the whole block, also where it is cut short.

    Attributes:
        query_block, key_block: tokens of a block along each spatial axis.
        kv_num: int32 `[B or 1, lists, query blocks]`, how many blocks of keys are listed. There are 1, heads or
            key_heads lists; query heads that share a key head share its list, too, if there are key_heads.
        kv_idx: int32 `[B or 1, lists, query blocks, most]`, their numbers, distinct, 0 <= number < key blocks.
            Entries from kv_num on are ignored. On CPU the values are checked; elsewhere that would wait for the device.
        bias: None, or floating `[B or 1, lists, query blocks, most]`, added to every logit of the listed block
            (PSA: the log of a level). A constant: it takes no gradient.
        q_len, kv_len: None, or int32 `[blocks]` or `[B or 1, blocks]`: only the first so many tokens of a block exist.
            Queries past theirs get output 0 and log-sum-exp -inf, keys past theirs are seen by nobody.
        inverse: None, or what `invert` found: for every block of keys, who lists it. Its values are not checked either:
            a mask whose lists are replaced or written to needs another.
    """

    query_block: tuple[int, ...]
    key_block: tuple[int, ...]
    kv_num: Tensor
    kv_idx: Tensor
    bias: Tensor | None = None
    q_len: Tensor | None = None
    kv_len: Tensor | None = None
    inverse: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_indptr(
        cls,
        query_block: Sequence[int],
        key_block: Sequence[int],
        indptr: Tensor,
        indices: Tensor,
        *,
        most: int | None = None,
    ) -> BlockMask:
        """A mask of compressed lists (CSR), one for all batch entries and heads or one a head.

        Args:
            query_block, key_block: as in the attributes.
            indptr: integer `[query blocks + 1]` or `[lists, query blocks + 1]`, ascending; block i of list l attends to
                `indices[indptr[l, i] : indptr[l, i + 1]]`.
            indices: integer `[entries]`, blocks of keys.
            most: entries of the longest list. Read from `indptr`, which waits for a GPU, when None.

        Raises:
            ValueError, TypeError: tensors of other shapes or dtypes.
        """
        for name, x, dims in (("indptr", indptr, (1, 2)), ("indices", indices, (1,))):
            if x.is_floating_point() or x.dtype == torch.bool:
                raise TypeError(f"{name}.dtype={x.dtype} must be an integer dtype")
            if x.dim() not in dims or (name == "indptr" and x.shape[-1] < 1):
                raise ValueError(f"{name}.shape={tuple(x.shape)} must have {' or '.join(map(str, dims))} axes")
        starts = indptr.reshape(-1, indptr.shape[-1]).long()
        kv_num = starts.diff()
        if most is None:
            most = max(int(kv_num.max()), 1) if kv_num.numel() else 1
        places = starts[:, :-1, None] + torch.arange(most, device=indptr.device)
        kv_idx = pad(indices, (0, 1))[places.clamp(0, indices.shape[0])]  # ignored entries may lie past the end
        return cls(tuple(query_block), tuple(key_block), kv_num[None].int(), kv_idx[None].int())

    def with_inverse(self, key_shape: Sequence[int]) -> BlockMask:
        """This mask with its inverse, for a mask that is used again: the Triton backward then need not make it.

        Args:
            key_shape: tokens of the grid of keys along each axis.
        """
        return self._replace(inverse=invert(self.kv_num, self.kv_idx, prod(boxes(key_shape, self.key_block))))


def boxes(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """Boxes of `block` tokens along each axis of a grid, those cut short included."""
    return tuple(ceil_div(n, b) for n, b in zip(shape, block, strict=True))


def divides(shape: Sequence[int], block: Sequence[int]) -> bool:
    """Return whether no block of a grid is cut short."""
    return all(known(ceil_div(n, b) * b == n) for n, b in zip(shape, block, strict=True))


def listed(kv_num: Tensor, kv_idx: Tensor) -> Tensor:
    """Mask of the entries of the lists that count, bool `[B or 1, heads or 1, query blocks, most]`."""
    return torch.arange(kv_idx.shape[-1], device=kv_idx.device) < kv_num[..., None]


def by_entry(length: Tensor) -> Tensor:
    """`q_len` or `kv_len` as `[B or 1, blocks]`."""
    return length if length.dim() == 2 else length[None]


def by_head(lists: Tensor, heads: int) -> Tensor:
    """A tensor of lists `[B or 1, lists, …]` as `[B or 1, heads or 1, …]`."""
    count = lists.shape[1]
    return lists if count == 1 else lists.repeat_interleave(heads // count, 1)


def box_of_token(shape: Sequence[int], block: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """For every token of a grid its block, and its number inside the block: int64 `[tokens]` each."""
    box = inside = torch.zeros(1, dtype=torch.int64, device=device)
    for n, b, count in zip(shape, block, boxes(shape, block), strict=True):
        position = torch.arange(n, device=device)
        box = (box[:, None] * count + position // b).flatten()
        inside = (inside[:, None] * b + modulo(position, b)).flatten()
    return box, inside


def invert(kv_num: Tensor, kv_idx: Tensor, key_boxes: int) -> tuple[Tensor, Tensor]:
    """For every block of keys, the entries of the lists that name it.

    Returns:
        starts: int32 `[B or 1, heads or 1, key_boxes + 1]`; block j is named by entries
            `order[starts[j] : starts[j + 1]]`.
        order: int32 `[B or 1, heads or 1, query blocks * most]`, entries as `query block * most + place in its list`,
            in ascending order for every block of keys.
    """
    numbers = torch.where(listed(kv_num, kv_idx), kv_idx, key_boxes).flatten(2)  # what is ignored sorts to the end
    numbers, order = numbers.sort(dim=-1, stable=True)
    edges = torch.arange(key_boxes + 1, dtype=numbers.dtype, device=numbers.device)
    starts = torch.searchsorted(numbers, edges.expand(*numbers.shape[:-1], -1).contiguous(), out_int32=True)
    return starts, order.to(torch.int32)
