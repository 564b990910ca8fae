"""Tile sizes and launch parameters of the neighborhood kernels.

The number of tokens per tile comes from a pinned table by device, kernel, head dim and element size. Its shape is the
split of that number over the axes that visits the fewest (query, key) pairs. Nothing depends on timing, so a call
always takes the same kernel.
"""

from functools import lru_cache
from math import prod
from typing import Literal, NamedTuple

from ..common.launching import AMD, MIN_TILE, Device, Overrides, Vectors, block_d, feature_parts, vectors
from .geometry import Axis, tile_walk

Kernel = Literal["forward", "query", "key"]


class Size(NamedTuple):
    """Tokens per query tile and per key tile, warps per program, and stages of the load pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


class Config(NamedTuple):
    """Launch parameters of one kernel.

    Attributes:
        queries, keys: tile of queries and of keys along the three axes, powers of two.
        warps: warps per program.
        stages: stages of the load pipeline.
        descriptor: whether tensor descriptors (TMA) load the tiles of the loop.
        inner: whether some visited tile is wholly visible; such tiles skip the mask.
        border: whether some visited tile needs the mask.
        wide: whether offsets within a batch entry and head need 64 bits.
    """

    queries: tuple[int, int, int]
    keys: tuple[int, int, int]
    warps: int
    stages: int
    descriptor: bool
    inner: bool
    border: bool
    wide: bool


# (device, kernel, element bytes) -> {head dim up to: sizes}. One byte stands for e4m3 queries and keys with values in
# half precision. Windows choose among several sizes, see `choose`; programs of one warp are for small windows, of whose
# larger tiles most pairs are masked.
SIZES: dict[tuple[Device, Kernel, int], dict[int, tuple[Size, ...]]] = {
    ("hopper", "forward", 1): {
        32: (Size(64, 64, 4, 2), Size(64, 32, 4, 2)),
        64: (Size(128, 64, 4, 3), Size(64, 64, 4, 3), Size(64, 32, 4, 3)),
        128: (Size(128, 128, 8, 2), Size(128, 64, 8, 2), Size(64, 64, 4, 2)),
        256: (Size(64, 32, 4, 2),),
    },
    ("hopper", "forward", 2): {
        32: (Size(64, 64, 4, 2), Size(64, 32, 4, 2), Size(32, 32, 1, 2)),
        64: (Size(128, 64, 4, 3), Size(64, 64, 4, 3), Size(64, 32, 4, 3)),
        128: (Size(128, 128, 8, 2), Size(128, 64, 8, 2), Size(64, 64, 4, 2)),
        160: (Size(64, 32, 4, 2),),
        256: (Size(64, 32, 4, 2),),
    },
    ("hopper", "query", 2): {
        32: (Size(64, 64, 4, 2), Size(64, 32, 4, 2), Size(32, 32, 1, 2)),
        64: (Size(64, 64, 4, 2), Size(64, 32, 4, 2)),
        128: (Size(128, 64, 8, 2), Size(64, 64, 4, 2)),
        160: (Size(64, 32, 4, 2),),
        256: (Size(32, 32, 4, 1),),
    },
    ("hopper", "key", 2): {
        32: (Size(64, 64, 4, 2), Size(32, 64, 4, 2), Size(32, 32, 1, 1)),
        64: (Size(64, 64, 4, 2), Size(32, 64, 4, 2)),
        128: (Size(32, 64, 4, 1),),
        256: (Size(32, 16, 4, 1),),
    },
    ("hopper", "forward", 4): {64: (Size(32, 32, 4, 1),), 128: (Size(16, 16, 4, 1),), 256: (Size(16, 16, 8, 1),)},
    ("hopper", "query", 4): {64: (Size(16, 32, 4, 1),), 128: (Size(16, 16, 8, 1),), 256: (Size(16, 16, 8, 1),)},
    ("hopper", "key", 4): {64: (Size(16, 32, 4, 1),), 128: (Size(16, 16, 8, 1),), 256: (Size(16, 16, 8, 1),)},
    ("ampere", "forward", 2): {
        32: (Size(128, 64, 4, 3), Size(64, 64, 4, 3), Size(64, 32, 4, 3), Size(32, 32, 1, 2)),
        64: (Size(128, 64, 4, 3), Size(64, 64, 4, 3), Size(64, 32, 4, 3)),
        80: (Size(64, 32, 4, 2),),
        128: (Size(64, 64, 4, 2), Size(64, 32, 4, 2)),
        160: (Size(64, 16, 4, 2),),
        256: (Size(32, 16, 2, 1),),
    },
    ("ampere", "query", 2): {
        32: (Size(64, 64, 4, 2), Size(64, 32, 4, 2), Size(32, 32, 1, 1)),
        64: (Size(64, 64, 4, 2), Size(64, 32, 4, 2)),
        128: (Size(64, 32, 4, 2),),
        160: (Size(64, 32, 4, 2),),
        256: (Size(32, 32, 4, 1),),
    },
    ("ampere", "key", 2): {
        32: (Size(64, 64, 4, 2), Size(32, 64, 4, 2), Size(32, 32, 1, 1)),
        64: (Size(64, 64, 4, 2), Size(32, 64, 4, 2)),
        96: (Size(16, 64, 4, 1),),
        128: (Size(32, 64, 4, 1),),
        256: (Size(32, 32, 4, 1),),
    },
    ("ampere", "forward", 4): {64: (Size(32, 32, 4, 1),), 128: (Size(16, 16, 4, 1),), 256: (Size(16, 16, 8, 1),)},
    ("ampere", "query", 4): {64: (Size(16, 32, 4, 1),), 128: (Size(16, 16, 4, 1),), 256: (Size(16, 16, 8, 1),)},
    ("ampere", "key", 4): {64: (Size(16, 32, 4, 1),), 128: (Size(16, 16, 8, 1),), 256: (Size(16, 16, 8, 1),)},
    ("ada", "forward", 1): {64: (Size(64, 32, 4, 2),), 128: (Size(64, 32, 4, 2),), 256: (Size(32, 16, 2, 1),)},
    ("ada", "forward", 2): {
        32: (Size(64, 64, 4, 2), Size(64, 32, 4, 2), Size(32, 32, 1, 2)),
        64: (Size(64, 64, 4, 2), Size(64, 32, 4, 2)),
        128: (Size(64, 32, 4, 2),),
        160: (Size(64, 16, 4, 2),),
        256: (Size(32, 16, 2, 1),),
    },
    ("ada", "query", 2): {
        32: (Size(64, 32, 4, 2), Size(32, 32, 1, 1)),
        64: (Size(64, 32, 4, 2),),
        128: (Size(64, 32, 4, 1),),
        160: (Size(64, 32, 4, 2),),
        256: (Size(32, 32, 4, 1),),
    },
    ("ada", "key", 2): {
        32: (Size(32, 64, 4, 2), Size(32, 32, 1, 1)),
        64: (Size(32, 64, 4, 2),),
        96: (Size(16, 64, 4, 1),),
        128: (Size(32, 64, 4, 1),),
        256: (Size(32, 32, 4, 1),),
    },
    ("ada", "forward", 4): {64: (Size(32, 32, 4, 1),), 128: (Size(16, 16, 4, 1),), 256: (Size(16, 16, 8, 1),)},
    ("ada", "query", 4): {64: (Size(16, 16, 4, 1),), 128: (Size(16, 16, 4, 1),), 256: (Size(16, 16, 8, 1),)},
    ("ada", "key", 4): {64: (Size(16, 16, 4, 1),), 128: (Size(16, 16, 4, 1),), 256: (Size(16, 16, 8, 1),)},
    ("amd", "forward", 2): {
        64: (Size(128, 64, 4, 1), Size(64, 64, 2, 1)),
        128: (Size(128, 64, 4, 1), Size(64, 64, 2, 1)),
        256: (Size(64, 32, 2, 1),),
    },
    ("amd", "query", 2): {64: (Size(64, 64, 2, 1),), 128: (Size(64, 32, 2, 1),), 256: (Size(16, 32, 1, 1),)},
    ("amd", "key", 2): {64: (Size(64, 64, 2, 1),), 128: (Size(32, 64, 2, 1),), 256: (Size(16, 16, 1, 1),)},
    ("rdna", "forward", 2): {64: (Size(64, 64, 4, 1),), 128: (Size(64, 32, 4, 1),), 256: (Size(64, 16, 4, 1),)},
    ("rdna", "query", 2): {64: (Size(64, 32, 4, 1),), 128: (Size(64, 16, 4, 1),), 256: (Size(16, 16, 4, 1),)},
    ("rdna", "key", 2): {64: (Size(16, 64, 4, 1),), 128: (Size(16, 32, 4, 1),), 256: (Size(16, 16, 8, 1),)},
    ("amd", "forward", 4): {64: (Size(32, 32, 4, 1),), 128: (Size(16, 16, 4, 1),), 256: (Size(16, 16, 8, 1),)},
    ("amd", "query", 4): {64: (Size(16, 16, 4, 1),), 128: (Size(16, 16, 4, 1),), 256: (Size(16, 16, 8, 1),)},
    ("amd", "key", 4): {64: (Size(16, 16, 4, 1),), 128: (Size(16, 16, 4, 1),), 256: (Size(16, 16, 8, 1),)},
}
SIZES |= {("rdna", kernel, 4): table for (device, kernel, size), table in SIZES.items() if (device, size) == ("amd", 4)}
# head dim -> sizes of the Gluon forward: two consumers of 64 queries, of four warps each, and a producer
GLUON_SIZES: dict[int, tuple[Size, ...]] = {
    64: (Size(128, 128, 4, 3), Size(128, 64, 4, 4)),
    128: (Size(128, 128, 4, 2), Size(128, 64, 4, 3)),
}
SAME_COST = 1.1  # costs within 10 % count as equal: the estimate is no more accurate

# Clocks of an SM, fitted to the counts of `tools.compile_report --loop` and of all instructions outside of loops: for a
# pair of a visited tile (its softmax and, by head dim, the products that it does not hide), for the mask on top, and
# for what every warp issues once per tile and once per program.
PAIR_CLOCKS: dict[Device, dict[int, float]] = {
    "hopper": {32: 1 / 16, 64: 1 / 12, 128: 1 / 5, 256: 2 / 5},
    "ampere": {32: 1 / 16, 64: 1 / 8, 128: 1 / 4, 256: 1 / 2},
    "ada": {32: 1 / 8, 64: 1 / 4, 128: 1 / 2, 256: 1.0},
    "amd": {32: 1 / 16, 64: 1 / 8, 128: 1 / 4, 256: 1 / 2},  # not counted: products as fast as on ampere
    "rdna": {32: 1 / 8, 64: 1 / 4, 128: 1 / 2, 256: 1.0},  # not counted: as fast as on ada
}
MASK_COST = 0.125
TILE_CLOCKS = 40
PROGRAM_CLOCKS, PROGRAM_CLOCKS_PER_FEATURE = 100, 3
# Bytes per clock that an SM gets from L2, about what is published for H100, A100 and RTX 4090; for MI300, whose
# programs share keys across eight L2s, from the cache behind.
L2_BYTES: dict[Device, int] = {"hopper": 26, "ampere": 32, "ada": 16, "amd": 27, "rdna": 16}

# Building two descriptors costs a third of the 1,000 instructions outside the loop, and a round trip to memory.
# Pointers cost 5 to 13 instructions per tile for narrow heads, but 45 and many registers for wide ones.
FEW_TILES, NARROW_HEAD = 6, 32

PAIR_ROWS = 64  # queries of a program that stores dS of its pairs, where there is a choice: more spill registers

forced = Overrides(*Config._fields, "size")
override = forced.override


def token_block(head_dim: int, itemsize: int) -> int:
    """Tokens per iteration of the kernels that loop over all tokens: 8 KiB of a head."""
    return max(MIN_TILE, min(64, 8192 // itemsize // block_d(head_dim)))


def extra_block(extra: int, head_dim: int, itemsize: int, device: Device) -> int:
    """Keys of an iteration over `extra` additional ones, in the forward and the query's gradient.

    Four warps side by side need 32 columns. On Hopper 64 spread what an iteration costs whatever its length.
    """
    return 64 if device == "hopper" and itemsize <= 2 and extra > 32 and head_dim <= 128 else 32


def extra_gradient_size(extra: int, head_dim: int, itemsize: int, device: Device) -> Size:
    """Sizes of the kernel of the gradients of `extra` additional keys, whose programs hold a few of them and walk all
    queries: 64 keys, where registers hold their two gradients, read the queries four times less often than 16."""
    width, queries = block_d(head_dim), token_block(head_dim, itemsize)
    if itemsize >= 4:  # products of float32 take twice the registers
        return Size(queries, 16, 8, 2)
    if extra <= 16 or device == "rdna" or (device == "amd" and width > 128):
        return Size(queries, 16, 2 if width > 128 else 4, 2)  # tiles of 16 by 16 feed two warps
    if width > 128:
        return Size(queries, 32, 4, 2)
    return Size(16 if device == "hopper" and width > 64 else queries, 64, 4, 2)


def splits(tokens: int, rank: int) -> list[tuple[int, ...]]:
    """All ways to split a power of two over `rank` axes."""
    if rank == 1:
        return [(tokens,)]
    return [(1 << i, *rest) for i in range(tokens.bit_length()) for rest in splits(tokens >> i, rank - 1)]


def three_axes(tile: tuple[int, ...]) -> tuple[int, int, int]:
    """A tile with leading axes of length 1 added up to three."""
    x, y, z = (1,) * (3 - len(tile)) + tile
    return x, y, z


def tile_clocks(kernel: Kernel, size: Size, head_dim: int, itemsize: int, device: Device) -> tuple[float, float, float]:
    """Estimated clocks of an SM for a tile that is wholly visible, for one that takes the mask, and for a program."""
    width, whole = sum(feature_parts(head_dim, device, longest_split(kernel, device))), block_d(head_dim)
    work = size.queries * size.keys * PAIR_CLOCKS[device][max(32, whole)] * width / whole
    columns = size.queries if kernel == "key" else size.keys
    loads = columns * 2 * width * itemsize / L2_BYTES[device]
    inner, border = (max(loads, work * (1 + mask) + TILE_CLOCKS * size.warps) for mask in (0, MASK_COST))
    return inner, border, (PROGRAM_CLOCKS + PROGRAM_CLOCKS_PER_FEATURE * width) * size.warps


def longest_split(kernel: Kernel, device: Device) -> int:
    """The longest vectors that a kernel may hold in two parts: two gradients of 160 features spill registers."""
    return 128 if kernel == "key" or device in AMD else 256


def held(head_dim: int, value_dim: int, kernel: Kernel, device: Device, *, eight_bits: bool = False) -> Vectors:
    """How a kernel holds vectors; see `launching.vectors`."""
    return vectors(head_dim, value_dim, device, longest_split(kernel, device), eight_bits=eight_bits)


def sizes_of(kernel: Kernel, head_dim: int, itemsize: int, device: Device) -> tuple[Size, ...]:
    """Sizes of the table for a head dim."""
    table, width = SIZES[device, kernel, itemsize], sum(feature_parts(head_dim, device, longest_split(kernel, device)))
    return next(table[limit] for limit in sorted(table) if width <= limit)


@lru_cache(maxsize=4096)
def shapes(
    kernel: Kernel, axes: tuple[Axis, ...], size: Size, clocks: tuple[float, float, float]
) -> tuple[float, tuple[int, ...], tuple[int, ...]]:
    """Cheapest tile shapes of `size`, whose tiles and programs take `clocks`, see `tile_clocks`.

    Returns:
        estimated clocks, query tile, key tile.
    """
    inverse = kernel == "key"
    of_inner, of_border, of_program = clocks
    options = []
    for queries in splits(size.queries, len(axes)):
        for keys in splits(size.keys, len(axes)):
            rows, columns = (keys, queries) if inverse else (queries, keys)
            walks = [tile_walk(a, r, c, inverse=inverse) for a, r, c in zip(axes, rows, columns, strict=True)]
            tiles, visited, inner = (prod(counts) for counts in zip(*walks, strict=True))
            cost = inner * of_inner + (visited - inner) * of_border + tiles * of_program
            options.append((cost, queries, keys))
    least = min(cost for cost, _, _ in options)
    # Among equal costs the most cubic shape wins, so that grids of other lengths share the compiled kernel.
    near = [option for option in options if option[0] <= SAME_COST * least]
    return min(near, key=lambda option: (sum(x * x for tile in option[1:] for x in tile), option[0]))


def choose(
    kernel: Kernel,
    axes: tuple[Axis, ...],
    *,
    head_dim: int,
    itemsize: int,
    device: Device,
    descriptor: bool,
    wide: bool,
    pairs: bool = False,
    sizes: tuple[Size, ...] | None = None,
) -> Config:
    """Launch parameters of one kernel for a grid of up to three axes.

    `descriptor` says whether tensor descriptors are possible; programs with few tiles use pointers even then. `pairs`
    says whether the kernel stores dS of its pairs, for the gradient of a bias table. `sizes` take the place of the
    table's.
    """
    if sizes is None:
        sizes = sizes_of(kernel, head_dim, itemsize, device)
    if pairs:
        sizes = tuple(size for size in sizes if size.queries <= PAIR_ROWS) or sizes
    if isinstance(size := forced.get("size"), Size):
        sizes = (size,)
    costs = [shapes(kernel, axes, size, tile_clocks(kernel, size, head_dim, itemsize, device)) for size in sizes]
    least = min(cost for cost, _, _ in costs)
    (_, queries, keys), size = next(
        option for option in zip(costs, sizes, strict=True) if option[0][0] <= SAME_COST * least
    )
    inverse = kernel == "key"
    rows, columns = (keys, queries) if inverse else (queries, keys)
    walks = [tile_walk(a, r, c, inverse=inverse) for a, r, c in zip(axes, rows, columns, strict=True)]
    few = prod([w.visited for w in walks]) <= FEW_TILES * prod([w.rows for w in walks])
    config = Config(
        queries=three_axes(queries),
        keys=three_axes(keys),
        warps=size.warps,
        stages=1 if wide and inverse else size.stages,  # 64-bit offsets need the registers of a second stage
        descriptor=descriptor and not (few and block_d(head_dim) <= NARROW_HEAD),
        inner=all(w.inner for w in walks),
        border=any(w.inner < w.visited for w in walks),
        wide=wide,
    )
    return forced.on(config)
