"""Count the tiles that a kernel visits, and bound its speed-up over dense attention, per tile shape.

The counts are those of the simulator of arXiv:2504.16922 (section 3). The bound assumes that all tiles take the same
time. Counting is exact and takes O(tokens along an axis): axes are independent, so the tiles of the grid are the
product of the tiles per axis.

    python -m foveal.kernels.neighborhood.simulator --shape 30 48 80 --window 18 24 24 --stride 16 8 8
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from .configs import splits
from .cost import backward_bytes, backward_flops, forward_bytes, forward_flops, visible_pairs
from .geometry import Axis, make_axes, tile_walk


@dataclass(frozen=True)
class Tiling:
    """Visited tiles per head and batch entry for one tile shape.

    Attributes:
        rows, columns: tokens of a tile along each axis: queries and keys or, with `inverse`, keys and queries.
        row_tiles: tiles of rows, one program each.
        visited: (row tile, column tile) pairs computed.
        interior: computed pairs in which each column is visible to each row, so that no mask is needed.
        dense: pairs of tiles of the same size that dense attention computes.
        pairs: visible (query, key) pairs.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    row_tiles: int
    visited: int
    interior: int
    dense: int
    pairs: int

    def __str__(self) -> str:
        return " by ".join("×".join(map(str, tile)) for tile in (self.rows, self.columns))

    @property
    def computed(self) -> int:
        """Computed (query, key) pairs, including padding and masked pairs."""
        return self.visited * prod(self.rows) * prod(self.columns)

    @property
    def efficiency(self) -> float:
        """Visible over computed pairs, at most 1."""
        return self.pairs / self.computed

    @property
    def interior_share(self) -> float:
        """Share of visited tiles that need no mask."""
        return self.interior / self.visited

    @property
    def speedup_bound(self) -> float:
        """Dense over visited tiles: the speed-up over dense attention if all tiles were equally fast."""
        return self.dense / self.visited


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def simulate(
    axes: Sequence[Axis],
    rows: Sequence[int],
    columns: Sequence[int],
    *,
    aligned: bool = False,
    inverse: bool = False,
    extra: int = 0,
) -> Tiling:
    """Count the tiles that a kernel visits, including ragged ends, dilation groups and extra keys.

    Args:
        axes: axes of the grid, from `make_axes`.
        rows: tokens of a query tile along each axis.
        columns: tokens of a key tile along each axis.
        aligned: start the first key tile at a multiple of its size, as kernels over permuted tokens must. By default it
            starts at the first key visible to the query tile, as in the kernels of this package.
        inverse: count for the dK/dV kernel: rows are keys, columns the queries to which they are visible.
        extra: extra keys visible to all queries, in tiles of as many tokens as a key tile; not with `inverse`.

    Raises:
        ValueError: a tile that does not name one positive size per axis, or `extra` with `inverse`.
    """
    rows, columns = tuple(rows), tuple(columns)
    for name, tile in (("rows", rows), ("columns", columns)):
        if len(tile) != len(axes) or min(tile) < 1:
            raise ValueError(f"{name}={tile} must hold one positive size for each of {len(axes)} axes")
    if inverse and extra:
        raise ValueError(f"extra={extra} must be 0 with inverse=True: extra keys lie outside the grid")
    walks = [
        tile_walk(axis, row, column, inverse=inverse, aligned=aligned)
        for axis, row, column in zip(axes, rows, columns, strict=True)
    ]
    row_tiles, visited, interior = (prod(counts) for counts in zip(*walks, strict=True))
    tokens, row_tokens, column_tokens = prod([axis.length for axis in axes]), prod(rows), prod(columns)
    return Tiling(
        rows=rows,
        columns=columns,
        row_tiles=row_tiles,
        visited=visited + row_tiles * _ceil_div(extra, column_tokens),
        interior=interior + row_tiles * (extra // column_tokens),
        dense=_ceil_div(tokens, row_tokens) * _ceil_div(tokens + extra, column_tokens),
        pairs=visible_pairs(axes, extra=extra),
    )


def rank_tiles(
    axes: Sequence[Axis],
    *,
    row_tokens: int = 64,
    column_tokens: int = 64,
    aligned: bool = False,
    inverse: bool = False,
    extra: int = 0,
) -> list[Tiling]:
    """Rank the tile shapes of the given numbers of tokens: fewest visited tiles first, then most interior tiles.

    Sides are powers of two.

    Args:
        axes, aligned, inverse, extra: as in `simulate`.
        row_tokens, column_tokens: tokens of a query and of a key tile, powers of two.

    Raises:
        ValueError: a number of tokens that is no power of two.
    """
    for name, tokens in (("row_tokens", row_tokens), ("column_tokens", column_tokens)):
        if tokens < 1 or tokens & (tokens - 1):
            raise ValueError(f"{name}={tokens} must be a power of two")
    rank = len(axes)
    shapes = product(splits(row_tokens, rank), splits(column_tokens, rank))
    tilings = [simulate(axes, rows, columns, aligned=aligned, inverse=inverse, extra=extra) for rows, columns in shapes]
    return sorted(tilings, key=lambda tiling: (tiling.visited, -tiling.interior))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m foveal.kernels.neighborhood.simulator",
        description="FLOPs, bytes and tile counts of a neighborhood.",
    )
    add = parser.add_argument
    add("--shape", type=int, nargs="+", required=True, help="tokens along each axis")
    add("--window", type=int, nargs="+", required=True, help="keys per axis")
    add("--stride", type=int, nargs="+", default=[1])
    add("--dilation", type=int, nargs="+", default=[1])
    add("--causal", type=int, nargs="+", default=[0], choices=(0, 1), help="one 0 or 1, or one per axis")
    add("--extra", type=int, default=0, help="extra keys visible to all queries")
    add("--batch", type=int, default=1)
    add("--heads", type=int, default=1)
    add("--head-dim", type=int, default=64)
    add("--itemsize", type=int, default=2, help="bytes of one element")
    add("--query-tile", type=int, nargs="+", help="default: the best shapes of --tokens tokens")
    add("--key-tile", type=int, nargs="+", help="default: the query tile")
    add(
        "--tokens",
        type=int,
        nargs=2,
        default=[64, 64],
        metavar=("QUERY", "KEY"),
        help="tokens of a tile, to rank shapes",
    )
    add("--aligned", action="store_true", help="start key tiles at multiples of their size")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the cost of a neighborhood and the tile counts of some tile shapes."""
    from rich.console import Console
    from rich.table import Table

    parser = _parser()
    args = parser.parse_args(arguments)

    def spread(values: list) -> list:
        return values * len(args.shape) if len(values) == 1 else values

    try:
        axes = make_axes(
            args.shape,
            window=spread(args.window),
            stride=spread(args.stride),
            dilation=spread(args.dilation),
            causal=[bool(c) for c in spread(args.causal)],
        )
        if args.query_tile:
            tile = spread(args.query_tile)
            key_tile = spread(args.key_tile) if args.key_tile else tile
            tilings = [simulate(axes, tile, key_tile, aligned=args.aligned, extra=args.extra)]
        else:
            row_tokens, column_tokens = args.tokens
            tilings = rank_tiles(
                axes, row_tokens=row_tokens, column_tokens=column_tokens, aligned=args.aligned, extra=args.extra
            )[:8]
    except ValueError as error:
        parser.error(str(error))

    sizes = {"batch": args.batch, "heads": args.heads, "head_dim": args.head_dim, "extra": args.extra}
    console = Console()
    pairs, tokens = visible_pairs(axes, extra=args.extra), prod(args.shape)
    console.print(
        f"{pairs:,} of {tokens * (tokens + args.extra):,} pairs: {tokens * (tokens + args.extra) / pairs:.2f}×"
    )
    for name, flops, moved in (
        ("forward", forward_flops(axes, **sizes), forward_bytes(axes, **sizes, itemsize=args.itemsize)),
        ("backward", backward_flops(axes, **sizes), backward_bytes(axes, **sizes, itemsize=args.itemsize)),
    ):
        console.print(f"{name}: {flops / 1e9:,.2f} GFLOP, {moved / 1e6:,.2f} MB, {flops / moved:,.1f} FLOP/B")
    table = Table("query tile", "key tile", "visited", "interior", "efficiency", "speed-up bound")
    for tiling in tilings:
        shares = f"{tiling.interior_share:.0%}", f"{tiling.efficiency:.0%}", f"{tiling.speedup_bound:.1f}×"
        table.add_row(*str(tiling).split(" by "), f"{tiling.visited:,}", *shares)
    console.print(table)


if __name__ == "__main__":
    main()
