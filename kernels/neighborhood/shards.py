"""One axis of a grid split over ranks: which keys travel from whom to whom.

The keys that the queries of a rank see lie in one range of the axis, which the windows of its outer queries bound.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from .geometry import Axis, crop, key_range


class Shard(NamedTuple):
    """What one rank has to do with the split axis.

    Attributes:
        axis: the axis as the rank computes on it, cropped to what its queries need.
        margin: tokens at the start of `axis` that nobody sends, because no query sees them.
        send: per rank, the range [first, last) of own tokens that it needs.
        receive: per rank, how many tokens come from it.
    """

    axis: Axis
    margin: int
    send: tuple[tuple[int, int], ...]
    receive: tuple[int, ...]


def split_evenly(length: int, ranks: int) -> tuple[int, ...]:
    """The lengths of the pieces that `torch.tensor_split` makes."""
    return tuple(length // ranks + (rank < length % ranks) for rank in range(ranks))


@lru_cache(maxsize=256)
def make_shards(axis: Axis, lengths: tuple[int, ...]) -> tuple[Shard, ...]:
    """The shard of every rank of a whole axis whose consecutive pieces have these lengths."""
    last = tuple(accumulate(lengths))
    pieces = [(end - n, end) for n, end in zip(lengths, last, strict=True)]
    needs = [key_range(axis._replace(queries=piece)) for piece in pieces]
    shards = []
    for piece, need in zip(pieces, needs, strict=True):
        first, cropped = crop(axis._replace(queries=piece))
        send = tuple(_overlap(piece, other) for other in needs)
        receive = tuple(stop - start for start, stop in (_overlap(other, need) for other in pieces))
        shards.append(Shard(cropped, need[0] - first, send, receive))
    return tuple(shards)


def _overlap(piece: tuple[int, int], need: tuple[int, int]) -> tuple[int, int]:
    """What of `need` lies in `piece`, counted from its start."""
    start, stop = (min(max(end, piece[0]), piece[1]) - piece[0] for end in need)
    return start, stop
