"""Bytes exchanged per rank when one axis is split over ranks, and FLOPs computed meanwhile: exact integers.

python -m foveal.kernels.neighborhood.sharded_cost --shape 30 48 80 --window 18 24 24 --heads 24 --head-dim 128
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from . import cost
from .geometry import Axis, make_axes, query_count
from .shards import make_shards, split_evenly


class RankCost(NamedTuple):
    """Cost of one call on one rank. The backward pass sends the bytes that the forward pass receives, and vice versa.

    Attributes:
        queries, keys: tokens of the split axis.
        sent, received: bytes that the forward pass sends to and receives from other ranks.
        forward_flops: useful FLOPs, see `cost.forward_flops`.
        interior: queries computed during the exchange.
        interior_flops: useful FLOPs of those queries.
    """

    queries: int
    keys: int
    sent: int
    received: int
    forward_flops: int
    interior: int
    interior_flops: int


def sharded_cost(
    axes: Sequence[Axis],
    *,
    axis: int,
    lengths: Sequence[int],
    heads: int,
    head_dim: int,
    itemsize: int,
    value_dim: int | None = None,
    key_heads: int | None = None,
    batch: int = 1,
) -> tuple[RankCost, ...]:
    """Cost of `sharded_neighborhood_attention` per rank.

    Args:
        axes: axes of the whole grid, from `make_axes`.
        axis: index of the split axis.
        lengths: tokens per rank along the split axis; `shards.split_evenly` gives those of an even split.
        heads, key_heads, head_dim, batch: sizes of query, and of key and value.
        itemsize: bytes of one element.
        value_dim: features of a head of value and output; `head_dim` when None.
    """
    token = batch * (key_heads or heads) * (head_dim + (value_dim or head_dim)) * itemsize  # key and value
    plane = token * prod([a.length for i, a in enumerate(axes) if i != axis])
    ranks = []
    for rank, shard in enumerate(make_shards(axes[axis], tuple(lengths))):
        parts = [(*axes[:axis], part.axis, *axes[axis + 1 :]) for part in shard.parts]
        sizes = {"batch": batch, "heads": heads, "head_dim": head_dim, "value_dim": value_dim}
        flops = [cost.forward_flops(part, **sizes) for part in parts]
        inside, inside_flops = 0, 0
        if shard.interior is not None:
            inside, inside_flops = query_count(shard.parts[shard.interior].axis), flops[shard.interior]
        sent, received = sum(shard.sent), sum(shard.receive)
        keys = lengths[rank] + received
        ranks.append(RankCost(lengths[rank], keys, sent * plane, received * plane, sum(flops), inside, inside_flops))
    return tuple(ranks)


def _row(axes: Sequence[Axis], axis: int, ranks: int, **sizes) -> str:
    costs = sharded_cost(axes, axis=axis, lengths=split_evenly(axes[axis].length, ranks), **sizes)
    most = max(costs, key=lambda cost: cost.received)
    share = cost.forward_flops(axes, **{name: sizes[name] for name in ("batch", "heads", "head_dim")}) / ranks
    worst = max(cost.forward_flops for cost in costs) / share
    pieces = f"{min(c.queries for c in costs)} to {max(c.queries for c in costs)}"
    hidden = f"{most.interior / most.queries:8.0%}  {most.interior_flops / max(most.received, 1):12,.0f}"
    row = f"{ranks:5}  {axis:4}  {pieces:>9}  {most.keys:4}  {most.received / 2**20:12,.1f}  {worst:12.2f}"
    return f"{row}  {hidden}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print bytes and overlapped FLOPs of the rank that receives most, per axis that can be split."""
    parser = argparse.ArgumentParser(
        prog="python -m foveal.kernels.neighborhood.sharded_cost",
        description="What a rank receives in the forward, and sends in the backward, when one axis is split.",
    )
    add = parser.add_argument
    add("--shape", type=int, nargs="+", required=True, help="tokens along each axis")
    for name in ("window", "stride", "dilation"):
        add(f"--{name}", type=int, nargs="+", required=name == "window", default=[1])
    add("--ranks", type=int, nargs="+", default=[2, 4, 8])
    add("--heads", type=int, default=1)
    add("--key-heads", type=int, help="default: --heads")
    add("--head-dim", type=int, default=64)
    add("--batch", type=int, default=1)
    add("--itemsize", type=int, default=2, help="bytes of an element")
    args = parser.parse_args(arguments)
    one_or_all = {name: (v[0] if len(v) == 1 else tuple(v)) for name, v in vars(args).items() if isinstance(v, list)}
    try:
        axes = make_axes(args.shape, **{name: one_or_all[name] for name in ("window", "stride", "dilation")})
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    sizes = {name: getattr(args, name) for name in ("batch", "heads", "key_heads", "head_dim", "itemsize")}
    print("ranks  axis     pieces  keys  MiB received  FLOPs / even  interior  FLOPs a byte")
    for ranks in args.ranks:
        for axis in range(len(axes)):
            if axes[axis].length >= ranks:
                print(_row(axes, axis, ranks, **sizes))
    tokens, key_heads = args.batch * prod(args.shape) * args.head_dim * args.itemsize, args.key_heads or args.heads
    for ranks in args.ranks:
        rest = (ranks - 1) / ranks
        every, by_heads = 2 * key_heads * tokens * rest, 2 * (args.heads + key_heads) * tokens / ranks * rest
        print(f"{ranks} ranks, all keys: {every / 2**20:,.1f} MiB; exchange of heads: {by_heads / 2**20:,.1f} MiB")


if __name__ == "__main__":
    main()
