"""Split of one axis over ranks: keys to send and receive per rank, and queries that need own keys only.

The keys visible to the queries of a rank form one range of the axis, bounded by the windows of its outermost queries.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from .geometry import Axis, crop, group_length, inverse_bounds, key_range

LEAST_INTERIOR = 1 / 4  # of a rank's queries; a smaller interior hides less time than its extra call costs


class Part(NamedTuple):
    """Consecutive queries of a rank that one call computes, and the sources of its keys along the axis.

    Attributes:
        queries: range [first, last) of the rank's piece.
        axis: the axis of the call, cropped to the keys that its queries can see.
        margin: tokens at the start of `axis` that are not sent, because no query sees them.
        lower: range of the tokens received from lower ranks.
        own: range of the rank's piece that follows.
        upper: range of the tokens received from higher ranks. Tokens of `axis` after those are visible to no query.
    """

    queries: tuple[int, int]
    axis: Axis
    margin: int
    lower: tuple[int, int]
    own: tuple[int, int]
    upper: tuple[int, int]


class Shard(NamedTuple):
    """Calls and exchanges of one rank.

    Attributes:
        parts: the calls that cover its queries, in order.
        interior: index of the part that needs own tokens only and runs during the exchange; None if there is none.
        send: per rank, range [first, last) of own tokens to send to it; empty for the rank itself.
        receive: per rank, number of tokens received from it; 0 for the rank itself.
    """

    parts: tuple[Part, ...]
    interior: int | None
    send: tuple[tuple[int, int], ...]
    receive: tuple[int, ...]

    @property
    def border(self) -> tuple[Part, ...]:
        """Parts that need received tokens."""
        return tuple(part for i, part in enumerate(self.parts) if i != self.interior)

    @property
    def sent(self) -> list[int]:
        """Number of own tokens to send per rank."""
        return [last - first for first, last in self.send]


def split_evenly(length: int, ranks: int) -> tuple[int, ...]:
    """Lengths of the pieces that `torch.tensor_split` makes."""
    return tuple(length // ranks + (rank < length % ranks) for rank in range(ranks))


@lru_cache(maxsize=256)
def make_shards(axis: Axis, lengths: tuple[int, ...]) -> tuple[Shard, ...]:
    """Shard per rank of a whole axis that is cut into consecutive pieces of these lengths."""
    ends = tuple(accumulate(lengths))
    pieces = [(end - n, end) for n, end in zip(lengths, ends, strict=True)]
    needs = [key_range(axis._replace(queries=piece)) for piece in pieces]
    shards = []
    for rank, (piece, need) in enumerate(zip(pieces, needs, strict=True)):
        start, stop = interior(axis, piece)
        if stop - start < LEAST_INTERIOR * (piece[1] - piece[0]):
            start, stop = piece[0], piece[0]
        cuts = [(piece[0], start), (start, stop), (stop, piece[1])]
        parts = {i: _make_part(axis, piece, need, queries) for i, queries in enumerate(cuts) if queries[0] < queries[1]}
        send = tuple((0, 0) if i == rank else _overlap(piece, other) for i, other in enumerate(needs))
        came = [(0, 0) if i == rank else _overlap(other, need) for i, other in enumerate(pieces)]
        receive = tuple(last - first for first, last in came)
        shards.append(Shard(tuple(parts.values()), list(parts).index(1) if 1 in parts else None, send, receive))
    return tuple(shards)


def interior(axis: Axis, piece: tuple[int, int]) -> tuple[int, int]:
    """Range [first, last) of the queries whose cropped axis lies inside the piece; it may be empty.

    Where the range does not reach an end of the piece, it is cut at a multiple of stride * dilation.
    """
    (first, last), block = piece, axis.stride * axis.dilation
    low = -(-first // block) * block  # first key that a crop can keep
    high = last // block * block if axis.causal and last < axis.length else last  # and the end of those keys
    if low >= high:
        return first, first
    start, stop = first, last
    for group in range(axis.dilation):
        n, before, after = (group_length(i, axis.dilation, group) for i in (axis.length, low, high))
        if before > 0:  # bounds are monotone: the last query that sees key low - 1 bounds all that see an earlier one
            _, seen_until = inverse_bounds(before - 1, n, axis.window, axis.stride, axis.causal)
            start = max(start, (seen_until - 1) * axis.dilation + group + 1)
        if after < n:
            seen_from, _ = inverse_bounds(after, n, axis.window, axis.stride, axis.causal)
            stop = min(stop, seen_from * axis.dilation + group)
    start = first if start == first else -(-start // block) * block
    stop = last if stop == last else stop // block * block
    return (start, stop) if start < stop else (first, first)


def _make_part(axis: Axis, piece: tuple[int, int], need: tuple[int, int], queries: tuple[int, int]) -> Part:
    """Part of some queries of a piece. `need` is the range of available keys; a crop can reach beyond it."""
    first, cropped = crop(axis._replace(queries=queries))
    run = first, first + cropped.length
    before = piece[0] - need[0]
    start, stop = _overlap((piece[1], need[1]), run)
    return Part(
        queries=_overlap(piece, queries),
        axis=cropped,
        margin=max(need[0] - first, 0),
        lower=_overlap((need[0], piece[0]), run),
        own=_overlap(piece, run),
        upper=(before + start, before + stop),
    )


def _overlap(piece: tuple[int, int], need: tuple[int, int]) -> tuple[int, int]:
    """Intersection of `need` with `piece`, counted from the start of `piece`."""
    start, stop = (min(max(end, piece[0]), piece[1]) - piece[0] for end in need)
    return start, stop
