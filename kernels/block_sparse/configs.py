"""Tile sizes and launch parameters of the block-sparse kernels: pinned, by device, kernel, head dim and element size.

Nothing here depends on timing, so a call always takes the same kernel.
"""

from math import prod
from typing import Literal, NamedTuple

from ..common.launching import Device, Overrides, block_d, tile_length

Kernel = Literal["forward", "query", "key"]


class Size(NamedTuple):
    """Tokens of a tile of rows and of columns, warps per program and depth of the load pipeline.

    Rows are those that a program owns, columns those it walks: queries and keys, in the "key" kernel keys and queries.
    """

    rows: int
    columns: int
    warps: int
    stages: int


class Config(NamedTuple):
    """How one kernel is launched; `queries` and `keys` are the tokens of the tiles, for the report."""

    size: Size
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    wide: bool


# (device, kernel, element bytes) -> {head dim up to: size}
SIZES: dict[tuple[Device, Kernel, int], dict[int, Size]] = {
    ("hopper", "forward", 2): {64: Size(64, 64, 4, 3), 128: Size(64, 64, 4, 2), 256: Size(64, 32, 4, 2)},
    ("hopper", "query", 2): {64: Size(64, 64, 4, 2), 128: Size(64, 64, 4, 2), 256: Size(32, 32, 4, 1)},
    ("hopper", "key", 2): {64: Size(64, 32, 4, 2), 128: Size(64, 32, 4, 1), 256: Size(32, 32, 4, 1)},
    ("hopper", "forward", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("hopper", "query", 4): {64: Size(16, 32, 4, 1), 128: Size(16, 16, 8, 1), 256: Size(16, 16, 8, 1)},
    ("hopper", "key", 4): {64: Size(32, 16, 4, 1), 128: Size(16, 16, 8, 1), 256: Size(16, 16, 8, 1)},
    ("ampere", "forward", 2): {64: Size(64, 64, 4, 3), 128: Size(64, 64, 4, 2), 256: Size(32, 16, 2, 1)},
    ("ampere", "query", 2): {64: Size(64, 32, 4, 2), 128: Size(64, 32, 4, 2), 256: Size(32, 32, 4, 1)},
    ("ampere", "key", 2): {64: Size(64, 32, 4, 2), 128: Size(64, 32, 4, 1), 256: Size(32, 32, 4, 1)},
    ("ampere", "forward", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("ampere", "query", 4): {64: Size(16, 32, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("ampere", "key", 4): {64: Size(32, 16, 4, 1), 128: Size(16, 16, 8, 1), 256: Size(16, 16, 8, 1)},
    ("ada", "forward", 2): {64: Size(64, 32, 4, 2), 128: Size(64, 32, 4, 2), 256: Size(32, 16, 2, 1)},
    ("ada", "query", 2): {64: Size(64, 32, 4, 2), 128: Size(64, 32, 4, 1), 256: Size(32, 32, 4, 1)},
    ("ada", "key", 2): {64: Size(64, 32, 4, 2), 128: Size(64, 32, 4, 1), 256: Size(32, 32, 4, 1)},
    ("ada", "forward", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("ada", "query", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("ada", "key", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("amd", "forward", 2): {64: Size(64, 64, 2, 1), 128: Size(64, 64, 2, 1), 256: Size(64, 32, 2, 1)},
    ("amd", "query", 2): {64: Size(64, 64, 2, 1), 128: Size(64, 32, 2, 1), 256: Size(16, 32, 1, 1)},
    ("amd", "key", 2): {64: Size(64, 64, 2, 1), 128: Size(64, 32, 2, 1), 256: Size(16, 16, 1, 1)},
    ("amd", "forward", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("amd", "query", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("amd", "key", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
}

forced = Overrides("size", "wide")
override = forced.override


def choose(
    kernel: Kernel, rows: tuple[int, ...], columns: int, *, head_dim: int, itemsize: int, device: Device, wide: bool
) -> Config:
    """Launch parameters of one kernel whose programs own tokens of boxes of `rows` and walk up to `columns` tokens."""
    table = SIZES[device, kernel, itemsize]
    size = table[min(limit for limit in table if block_d(head_dim) <= limit)]
    if isinstance(most := forced.get("size"), Size):
        size = most
    size = size._replace(rows=tile_length(prod(rows), size.rows), columns=tile_length(columns, size.columns))
    tiles = (size.rows,), (size.columns,)
    queries, keys = tiles if kernel != "key" else tiles[::-1]
    return Config(size, queries, keys, bool(forced.get("wide", wide)))
