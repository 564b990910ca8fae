"""Tile sizes and launch parameters of the block-sparse kernels: pinned, by device, kernel, head dim and element size.

Nothing here depends on timing, so a call always takes the same kernel.
"""

from math import prod
from typing import Literal, NamedTuple

from ..common.launching import AMD, Device, Overrides, Vectors, feature_parts, tile_length, vectors

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
    """How one kernel is launched.

    Attributes:
        size: tokens of the tiles, warps and stages.
        queries, keys: tokens of the tiles, for the report.
        wide: whether offsets have 64 bits.
        tile: sides of the part of a walked block that one iteration loads, along three axes; None where a tile of
            columns may cross blocks.
        descriptor: whether tensor descriptors (TMA) load these parts.
    """

    size: Size
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    wide: bool
    tile: tuple[int, int, int] | None = None
    descriptor: bool = False


# (device, kernel, element bytes) -> {head dim up to: size}
SIZES: dict[tuple[Device, Kernel, int], dict[int, Size]] = {
    ("hopper", "forward", 2): {
        64: Size(64, 64, 4, 3),
        128: Size(64, 64, 4, 2),
        160: Size(64, 32, 4, 2),
        256: Size(64, 32, 4, 2),
    },
    ("hopper", "query", 2): {
        64: Size(64, 64, 4, 2),
        128: Size(64, 64, 4, 2),
        160: Size(64, 32, 4, 2),
        256: Size(32, 32, 4, 1),
    },
    ("hopper", "key", 2): {64: Size(64, 32, 4, 2), 128: Size(64, 32, 4, 1), 256: Size(32, 32, 4, 1)},
    ("hopper", "forward", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("hopper", "query", 4): {64: Size(16, 32, 4, 1), 128: Size(16, 16, 8, 1), 256: Size(16, 16, 8, 1)},
    ("hopper", "key", 4): {64: Size(32, 16, 4, 1), 128: Size(16, 16, 8, 1), 256: Size(16, 16, 8, 1)},
    ("ampere", "forward", 2): {64: Size(64, 64, 4, 3), 128: Size(64, 64, 4, 2), 256: Size(32, 16, 2, 1)},
    ("ampere", "query", 2): {64: Size(64, 32, 4, 2), 128: Size(64, 32, 4, 2), 256: Size(32, 32, 4, 1)},
    ("ampere", "key", 2): {
        64: Size(64, 32, 4, 2),
        80: Size(64, 32, 4, 1),
        96: Size(64, 16, 4, 1),
        128: Size(64, 32, 4, 1),
        256: Size(32, 32, 4, 1),
    },
    ("ampere", "forward", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("ampere", "query", 4): {64: Size(16, 32, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("ampere", "key", 4): {64: Size(32, 16, 4, 1), 128: Size(16, 16, 8, 1), 256: Size(16, 16, 8, 1)},
    ("ada", "forward", 2): {64: Size(64, 32, 4, 2), 128: Size(64, 32, 4, 2), 256: Size(32, 16, 2, 1)},
    ("ada", "query", 2): {64: Size(64, 32, 4, 2), 128: Size(64, 32, 4, 1), 256: Size(32, 32, 4, 1)},
    ("ada", "key", 2): {
        64: Size(64, 32, 4, 2),
        80: Size(64, 32, 4, 1),
        96: Size(64, 16, 4, 1),
        128: Size(64, 32, 4, 1),
        256: Size(32, 32, 4, 1),
    },
    ("ada", "forward", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("ada", "query", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("ada", "key", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("amd", "forward", 2): {64: Size(64, 64, 2, 1), 128: Size(64, 64, 2, 1), 256: Size(64, 32, 2, 1)},
    ("amd", "query", 2): {64: Size(64, 64, 2, 1), 128: Size(64, 32, 2, 1), 256: Size(16, 32, 1, 1)},
    ("amd", "key", 2): {64: Size(64, 64, 2, 1), 128: Size(64, 32, 2, 1), 256: Size(16, 16, 1, 1)},
    ("rdna", "forward", 2): {64: Size(64, 64, 4, 1), 128: Size(64, 32, 4, 1), 256: Size(64, 16, 4, 1)},
    ("rdna", "query", 2): {64: Size(64, 32, 4, 1), 128: Size(64, 16, 4, 1), 256: Size(16, 16, 4, 1)},
    ("rdna", "key", 2): {64: Size(64, 32, 4, 1), 128: Size(32, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("amd", "forward", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("amd", "query", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("amd", "key", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
}
SIZES |= {("rdna", kernel, 4): table for (device, kernel, size), table in SIZES.items() if (device, size) == ("amd", 4)}

# Half precision, where blocks have sides of powers of two: an iteration loads a block or a part of one from one
# address. The first size that rows and columns of the blocks fill is taken. On Hopper 64 rows ask L2 for more than it
# gives at head dim 128, so blocks of 128 take 128 rows.
WHOLE: dict[tuple[Device, Kernel], dict[int, tuple[Size, ...]]] = {
    ("hopper", "forward"): {
        64: (Size(128, 64, 4, 3), Size(64, 64, 4, 3)),
        128: (Size(128, 128, 8, 2), Size(128, 64, 8, 2), Size(64, 64, 4, 2)),
    },
    ("hopper", "query"): {
        64: (Size(128, 64, 8, 2), Size(64, 64, 4, 2)),
        128: (Size(128, 64, 8, 2), Size(64, 64, 4, 2)),
    },
    ("hopper", "key"): {64: (Size(64, 64, 4, 2),), 128: (Size(128, 32, 8, 2), Size(64, 32, 4, 2))},
    ("ampere", "forward"): {64: (Size(128, 64, 4, 3), Size(64, 64, 4, 3)), 128: (Size(64, 64, 4, 2),)},
    ("ampere", "query"): {64: (Size(64, 32, 4, 2),), 128: (Size(64, 32, 4, 2),)},
    ("ampere", "key"): {64: (Size(64, 32, 4, 2),), 128: (Size(64, 32, 4, 1),)},
    ("ada", "forward"): {64: (Size(64, 32, 4, 2),), 128: (Size(64, 32, 4, 2),)},
    ("ada", "query"): {64: (Size(64, 32, 4, 2),), 128: (Size(64, 32, 4, 1),)},
    ("ada", "key"): {64: (Size(64, 32, 4, 2),), 128: (Size(64, 32, 4, 1),)},
    ("amd", "forward"): {64: (Size(64, 64, 2, 1),), 128: (Size(64, 64, 2, 1),)},
    ("amd", "query"): {64: (Size(64, 64, 2, 1),), 128: (Size(64, 32, 2, 1),)},
    ("amd", "key"): {64: (Size(64, 64, 2, 1),), 128: (Size(64, 32, 2, 1),)},
    ("rdna", "forward"): {64: (Size(64, 64, 4, 1),), 128: (Size(64, 32, 4, 1),)},
    ("rdna", "query"): {64: (Size(64, 32, 4, 1),), 128: (Size(64, 16, 4, 1),)},
    ("rdna", "key"): {64: (Size(64, 32, 4, 1),), 128: (Size(32, 16, 4, 1),)},
}
# head dim -> keys of a tile and stages of the Gluon forward, longest tiles first
GLUON_SIZES: dict[int, tuple[tuple[int, int], ...]] = {64: ((128, 3), (64, 4)), 128: ((128, 2), (64, 3))}
MIN_BOX = 64  # tokens; tiles of smaller blocks hold several

SKIP_TOKENS = 128  # of a block that a program holds at once, with queries, keys and values of at most `skip_bytes` each


def skip_bytes(device: Device) -> int:
    """Bytes that the vectors of a block may take with `skip_threshold`."""
    return 16 * 1024 if device == "ada" or device in AMD else 32 * 1024


forced = Overrides("size", "wide", "whole", "descriptor")
override = forced.override


def longest_split(kernel: Kernel, device: Device) -> int:
    """The longest vectors that a kernel may hold in two parts: gradients of 160 features and the addresses of tokens
    spill registers."""
    return 256 if kernel != "key" and device == "hopper" else 128


def held(head_dim: int, value_dim: int, kernel: Kernel, device: Device, *, eight_bits: bool = False) -> Vectors:
    """How a kernel holds vectors; see `launching.vectors`."""
    return vectors(head_dim, value_dim, device, longest_split(kernel, device), eight_bits=eight_bits)


def part(box: tuple[int, ...], tokens: int) -> tuple[int, int, int] | None:
    """Sides along three axes of equal parts of `tokens` tokens that divide a block, first axes split first.

    None where the block has fewer tokens, or a side that is no power of two.
    """
    if prod(box) < tokens or any(side & (side - 1) for side in box):
        return None
    sides = [1] * (3 - len(box)) + list(box)
    for axis in range(3):
        while prod(sides) > tokens and sides[axis] > 1:
            sides[axis] //= 2
    return sides[0], sides[1], sides[2]


def choose(
    kernel: Kernel,
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    most: int,
    *,
    head_dim: int,
    itemsize: int,
    device: Device,
    wide: bool,
    whole: bool = False,
    descriptor: bool = False,
) -> Config:
    """Launch parameters of one kernel whose programs own tokens of blocks of `rows` and walk blocks of `columns`.

    Args:
        kernel: of the tables.
        rows, columns: sides of a block.
        most: blocks of columns that a program may walk.
        head_dim: the larger one of keys and values.
        itemsize: bytes of a number.
        device: of the tables.
        wide: whether offsets need 64 bits.
        whole: whether an iteration may load whole blocks or parts of them: all tokens of a block in the grid exist.
        descriptor: whether the device has tensor descriptors.
    """
    whole = bool(forced.get("whole", whole and itemsize == 2 and min(prod(rows), prod(columns)) >= MIN_BOX))
    sizes = next((found for limit, found in WHOLE[device, kernel].items() if head_dim <= limit), ()) if whole else ()
    if whole and isinstance(given := forced.get("size"), Size):
        sizes = (_fitted(given, prod(rows), prod(columns)),)
    for size in sizes:
        tile = part(columns, size.columns)
        if tile is not None and size.rows <= tile_length(prod(rows), size.rows):
            descriptor = bool(forced.get("descriptor", descriptor))
            return _config(kernel, size, wide)._replace(tile=tile, descriptor=descriptor)
    table = SIZES[device, kernel, itemsize]
    width = sum(feature_parts(head_dim, device, longest_split(kernel, device)))
    size = table[min(limit for limit in table if width <= limit)]
    if isinstance(given := forced.get("size"), Size):
        size = given
    size = _fitted(size, prod(rows), most * prod(columns))
    return _config(kernel, size, wide)


def skipping(
    rows: tuple[int, ...], columns: tuple[int, ...], *, wide: bool, whole: bool = False, descriptor: bool = False
) -> Config:
    """Launch parameters of the forward with `skip_threshold`, whose tile is a block of queries by a block of keys.

    Arguments as in `choose`.
    """
    sizes = tile_length(prod(rows), SKIP_TOKENS), tile_length(prod(columns), SKIP_TOKENS)
    config = _config("forward", Size(*sizes, 8 if sizes[0] > 64 else 4, 2), wide)
    whole, descriptor = (bool(forced.get(name, x)) for name, x in (("whole", whole), ("descriptor", descriptor)))
    tile = part(columns, config.size.columns) if whole else None
    return config._replace(tile=tile, descriptor=descriptor and tile is not None)


def _fitted(size: Size, rows: int, columns: int) -> Size:
    """A size whose tiles are no longer than needed."""
    return size._replace(rows=tile_length(rows, size.rows), columns=tile_length(columns, size.columns))


def _config(kernel: Kernel, size: Size, wide: bool) -> Config:
    tiles = (size.rows,), (size.columns,)
    queries, keys = tiles if kernel != "key" else tiles[::-1]
    return Config(size, queries, keys, bool(forced.get("wide", wide)))
