"""One axis of a grid split over ranks: which keys travel from whom to whom, and which queries need none of them.

The keys that the queries of a rank see lie in one range of the axis, which the windows of its outer queries bound.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from .geometry import Axis, crop, group_length, inverse_bounds, key_range

LEAST_INTERIOR = 1 / 4  # of a rank's queries: a call more costs launches, and hides no more than its own time


class Part(NamedTuple):
    """Consecutive queries of a rank that are attended in one call, and where the keys of its axis come from, in order.

    Attributes:
        queries: [first, last) of the rank's piece.
        axis: the axis as the call computes on it, cropped to what its queries need.
        margin: tokens at the start of `axis` that nobody sends, because no query sees them.
        lower: [first, last) of the tokens received from lower ranks.
        own: [first, last) of the rank's piece.
        upper: [first, last) of the tokens received from higher ranks. What `axis` holds beyond, no query sees.
    """

    queries: tuple[int, int]
    axis: Axis
    margin: int
    lower: tuple[int, int]
    own: tuple[int, int]
    upper: tuple[int, int]


class Shard(NamedTuple):
    """What one rank has to do with the split axis.

    Attributes:
        parts: its queries, in order, in calls.
        interior: which part needs nothing but own tokens, so that others travel meanwhile; None if there is none.
        send: per rank, the range [first, last) of own tokens that it needs; none for the rank itself.
        receive: per rank, how many tokens come from it; none from the rank itself.
    """

    parts: tuple[Part, ...]
    interior: int | None
    send: tuple[tuple[int, int], ...]
    receive: tuple[int, ...]

    @property
    def border(self) -> tuple[Part, ...]:
        """The parts that wait for what travels."""
        return tuple(part for i, part in enumerate(self.parts) if i != self.interior)

    @property
    def sent(self) -> list[int]:
        """Per rank, how many own tokens it needs."""
        return [last - first for first, last in self.send]


def split_evenly(length: int, ranks: int) -> tuple[int, ...]:
    """The lengths of the pieces that `torch.tensor_split` makes."""
    return tuple(length // ranks + (rank < length % ranks) for rank in range(ranks))


@lru_cache(maxsize=256)
def make_shards(axis: Axis, lengths: tuple[int, ...]) -> tuple[Shard, ...]:
    """The shard of every rank of a whole axis whose consecutive pieces have these lengths."""
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
    """Coordinates [first, last) of the queries of a piece for whom `crop` keeps nothing outside the piece.

    Away from the ends of the piece they are whole blocks of stride * dilation. There may be none.
    """
    (first, last), block = piece, axis.stride * axis.dilation
    low = -(-first // block) * block  # keys from here on are left by a crop
    high = last // block * block if axis.causal and last < axis.length else last  # and those up to here
    if low >= high:
        return first, first
    start, stop = first, last
    for group in range(axis.dilation):
        n, before, after = (group_length(i, axis.dilation, group) for i in (axis.length, low, high))
        if before > 0:  # whoever sees a key before `low` comes before the last that sees the last of them
            _, seen_until = inverse_bounds(before - 1, n, axis.window, axis.stride, axis.causal)
            start = max(start, (seen_until - 1) * axis.dilation + group + 1)
        if after < n:
            seen_from, _ = inverse_bounds(after, n, axis.window, axis.stride, axis.causal)
            stop = min(stop, seen_from * axis.dilation + group)
    start = first if start == first else -(-start // block) * block
    stop = last if stop == last else stop // block * block
    return (start, stop) if start < stop else (first, first)


def _make_part(axis: Axis, piece: tuple[int, int], need: tuple[int, int], queries: tuple[int, int]) -> Part:
    """Some queries of a piece; `need` is what its rank holds or receives, in which a crop may reach over both ends."""
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
    """What of `need` lies in `piece`, counted from its start."""
    start, stop = (min(max(end, piece[0]), piece[1]) - piece[0] for end in need)
    return start, stop
