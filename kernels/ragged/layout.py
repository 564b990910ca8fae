"""Entries of different sizes, one after the other in memory, and the groups of equal sizes among them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.calling import is_integer, tracing

Size = tuple[int, ...]


class RaggedLayout:
    """Sizes of the entries of a packed batch. Make it once a batch: every layer of a model takes the same one.

    Args:
        sizes: tokens along each axis of every entry, such as [(14, 14), (9, 21)]; plain integers for sequences; or an
            integer tensor `[entries]` or `[entries, axes]`, which is read on the host. Entries without tokens are
            allowed.

    Attributes:
        sizes: a tuple of tuples.
        rank: axes of an entry, 1 to 3.
        tokens: of all entries together.

    Raises:
        ValueError, TypeError: no entries, sizes that are no integers from 0 on, or of several numbers of axes.
    """

    def __init__(self, sizes: Sequence[int | Sequence[int]] | Tensor):
        if isinstance(sizes, Tensor):
            if sizes.dtype.is_floating_point or sizes.dtype.is_complex or sizes.dim() not in (1, 2):
                raise ValueError(
                    f"sizes ({sizes.dtype}, {tuple(sizes.shape)}) must hold integers, [entries] or [entries, axes]"
                )
            sizes = sizes.tolist()
        if not isinstance(sizes, Sequence) or isinstance(sizes, str):
            raise TypeError(f"sizes must be a list, a tuple or a tensor, got {type(sizes).__name__}")
        self.sizes: tuple[Size, ...] = tuple(tuple(x) if isinstance(x, Sequence) else (x,) for x in sizes)
        if not self.sizes:
            raise ValueError("sizes must have at least one entry")
        for i, size in enumerate(self.sizes):
            if not all(is_integer(n) and n >= 0 for n in size):
                raise ValueError(f"sizes[{i}]={size} must hold integers of at least 0")
            if len(size) != len(self.sizes[0]) or not 1 <= len(size) <= 3:
                raise ValueError(f"sizes[{i}]={size} must have 1 to 3 axes, as many as sizes[0]={self.sizes[0]}")
        self.rank = len(self.sizes[0])
        self.tokens = sum(map(prod, self.sizes))

    @classmethod
    def from_cumulative(cls, cumulative: Sequence[int] | Tensor) -> RaggedLayout:
        """The layout of sequences by their ends, as flash-attention's `cu_seqlens`: [0, 5, 12] are 5 and 7 tokens.

        Args:
            cumulative: integers `[entries + 1]`, beginning with 0 and never falling; a tensor is read on the host.
        """
        ends = cumulative.tolist() if isinstance(cumulative, Tensor) else list(cumulative)
        if len(ends) < 2 or ends[0] != 0:
            raise ValueError(f"cumulative={ends} must begin with 0 and have one more number for every entry")
        return cls([after - before for before, after in pairwise(ends)])

    @classmethod
    def of(cls, sizes: RaggedLayout | Sequence[int | Sequence[int]] | Tensor) -> RaggedLayout:
        """`sizes` itself if it is a layout, else the layout of them."""
        return sizes if isinstance(sizes, RaggedLayout) else cls(sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RaggedLayout) and self.sizes == other.sizes

    def __hash__(self) -> int:
        return hash(self.sizes)

    def __repr__(self) -> str:
        return f"RaggedLayout({list(self.sizes)})"


class Group(NamedTuple):
    """Entries of one size.

    Attributes:
        size, key_size: grid of the queries and of the keys.
        members: numbers of the entries, ascending.
    """

    size: Size
    key_size: Size
    members: tuple[int, ...]


class Order(NamedTuple):
    """Where the tokens of groups lie in the packed batch.

    Attributes:
        tokens: int64 `[tokens]`, the packed place of each token, group after group; None if they lie so already.
        inverse: int64 `[tokens]`, the other way.
    """

    tokens: Tensor | None
    inverse: Tensor | None


def _find_groups(sizes: tuple[Size, ...], key_sizes: tuple[Size, ...]) -> tuple[Group, ...]:
    found: dict[tuple[Size, Size], list[int]] = {}
    for i, pair in enumerate(zip(sizes, key_sizes, strict=True)):
        found.setdefault(pair, []).append(i)
    return tuple(Group(*pair, tuple(members)) for pair, members in found.items() if prod(pair[0]))


_kept_groups = lru_cache(maxsize=256)(_find_groups)


def find_groups(sizes: tuple[Size, ...], key_sizes: tuple[Size, ...]) -> tuple[Group, ...]:
    """Groups of entries with equal grids, in the order of their first members; entries without queries are in none."""
    return _find_groups(sizes, key_sizes) if tracing() else _kept_groups(sizes, key_sizes)


def _find_order(sizes: tuple[Size, ...], groups: tuple[Group, ...], device: torch.device) -> Order:
    lengths = list(map(prod, sizes))
    if [i for group in groups for i in group.members] == [i for i, n in enumerate(lengths) if n]:
        return Order(None, None)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    pieces = []
    for group in groups:
        members = torch.tensor(group.members)
        pieces.append((starts[members][:, None] + torch.arange(lengths[group.members[0]])).flatten())
    tokens = torch.cat(pieces)
    return Order(tokens.to(device), tokens.argsort().to(device))


_kept_order = lru_cache(maxsize=64)(_find_order)


def find_order(sizes: tuple[Size, ...], groups: tuple[Group, ...], device: torch.device) -> Order:
    """Order of the tokens by groups on a device; kept, since all layers of a model ask for the same."""
    return _find_order(sizes, groups, device) if tracing() else _kept_order(sizes, groups, device)


def _find_members(members: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(members, device=device)


_kept_members = lru_cache(maxsize=256)(_find_members)


def take_members(x: Tensor, members: tuple[int, ...]) -> Tensor:
    """Entries of a tensor `[entries, …]`; a view where they follow each other."""
    if members[-1] - members[0] == len(members) - 1:
        return x.narrow(0, members[0], len(members))
    return x.index_select(0, (_find_members if tracing() else _kept_members)(members, x.device))
