"""Tile sizes, launch parameters and splits of the kernels of agent attention. Nothing here depends on timing."""

from math import ceil
from typing import Literal, NamedTuple

from ..common.launching import AMD, Device, Overrides, block_d, tile_length

Kernel = Literal["forward", "query", "key", "bias"]
# Where the long axis is split over programs: programs to aim for, and the fewest tokens (batch entries) that one takes.
PROGRAMS = 1024
MIN_CHUNK = {"tokens": 256, "batch": 8}


class Size(NamedTuple):
    """Most agents and tokens in a tile, warps per program and depth of the load pipeline."""

    agents: int
    tokens: int
    warps: int
    stages: int


class Config(NamedTuple):
    """How one kernel is launched.

    Attributes:
        queries, keys: tokens in a tile of queries and of keys, powers of two.
        warps: warps per program.
        stages: depth of the load pipeline.
        wide: whether offsets inside a batch entry and head take 64 bits.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    wide: bool


# (device, kernel, element bytes) -> {head dim up to: size}
SIZES: dict[tuple[Device, Kernel, int], dict[int, Size]] = {
    ("hopper", "forward", 2): {64: Size(64, 64, 4, 2), 128: Size(64, 64, 4, 2), 256: Size(32, 32, 4, 1)},
    ("hopper", "query", 2): {64: Size(64, 64, 4, 2), 128: Size(64, 64, 4, 2), 256: Size(32, 32, 4, 1)},
    ("hopper", "key", 2): {64: Size(64, 64, 4, 2), 128: Size(32, 64, 4, 1), 256: Size(32, 32, 4, 1)},
    ("hopper", "bias", 2): {64: Size(64, 64, 4, 2), 128: Size(64, 64, 4, 1), 256: Size(32, 32, 2, 1)},
    ("ampere", "forward", 2): {64: Size(64, 64, 4, 3), 128: Size(64, 64, 4, 2), 256: Size(32, 32, 4, 1)},
    ("ampere", "query", 2): {64: Size(64, 64, 4, 2), 128: Size(32, 32, 2, 2), 256: Size(32, 32, 4, 1)},
    ("ampere", "key", 2): {64: Size(32, 64, 4, 2), 128: Size(32, 64, 4, 1), 256: Size(32, 32, 4, 1)},
    ("ampere", "bias", 2): {64: Size(64, 64, 4, 2), 128: Size(32, 32, 2, 1), 256: Size(32, 32, 2, 1)},
    ("ada", "forward", 2): {64: Size(64, 64, 4, 2), 128: Size(32, 32, 2, 2), 256: Size(32, 32, 4, 1)},
    ("ada", "query", 2): {64: Size(64, 64, 4, 1), 128: Size(32, 32, 2, 1), 256: Size(32, 32, 4, 1)},
    ("ada", "key", 2): {64: Size(32, 64, 4, 1), 128: Size(32, 64, 4, 1), 256: Size(32, 32, 4, 1)},
    ("ada", "bias", 2): {64: Size(64, 64, 4, 1), 128: Size(32, 32, 2, 1), 256: Size(16, 16, 1, 1)},
    ("hopper", "forward", 4): {64: Size(32, 32, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("hopper", "query", 4): {64: Size(16, 16, 2, 1), 128: Size(16, 16, 8, 1), 256: Size(16, 16, 8, 1)},
    ("hopper", "key", 4): {64: Size(16, 32, 4, 1), 128: Size(16, 16, 8, 1), 256: Size(16, 16, 8, 1)},
    ("hopper", "bias", 4): {64: Size(16, 32, 4, 1), 128: Size(16, 16, 8, 1), 256: Size(16, 16, 8, 1)},
    ("ampere", "forward", 4): {64: Size(32, 32, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("ampere", "query", 4): {64: Size(16, 16, 2, 1), 128: Size(16, 16, 8, 1), 256: Size(16, 16, 8, 1)},
    ("ampere", "key", 4): {64: Size(16, 32, 4, 1), 128: Size(16, 16, 8, 1), 256: Size(16, 16, 8, 1)},
    ("ampere", "bias", 4): {64: Size(16, 32, 4, 1), 128: Size(16, 16, 8, 1), 256: Size(16, 16, 8, 1)},
    ("ada", "forward", 4): {64: Size(32, 32, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("ada", "query", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("ada", "key", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("ada", "bias", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("amd", "forward", 2): {64: Size(64, 64, 2, 1), 128: Size(64, 64, 2, 1), 256: Size(32, 32, 1, 1)},
    ("amd", "query", 2): {64: Size(64, 64, 2, 1), 128: Size(32, 32, 1, 1), 256: Size(16, 16, 1, 1)},
    ("amd", "key", 2): {64: Size(64, 64, 2, 1), 128: Size(32, 32, 1, 1), 256: Size(16, 16, 1, 1)},
    ("amd", "bias", 2): {64: Size(64, 64, 2, 1), 128: Size(32, 32, 1, 1), 256: Size(16, 16, 1, 1)},
    ("rdna", "forward", 2): {64: Size(64, 64, 4, 1), 128: Size(64, 32, 4, 1), 256: Size(16, 16, 2, 1)},
    ("rdna", "query", 2): {64: Size(64, 32, 4, 1), 128: Size(32, 16, 2, 1), 256: Size(16, 16, 1, 1)},
    ("rdna", "key", 2): {64: Size(32, 32, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("rdna", "bias", 2): {64: Size(32, 32, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("amd", "forward", 4): {64: Size(32, 32, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("amd", "query", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("amd", "key", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
    ("amd", "bias", 4): {64: Size(16, 16, 4, 1), 128: Size(16, 16, 4, 1), 256: Size(16, 16, 8, 1)},
}
SIZES |= {("rdna", kernel, 4): table for (device, kernel, size), table in SIZES.items() if (device, size) == ("amd", 4)}

forced = Overrides(*Config._fields, "chunk")  # chunk: of every split
override = forced.override


def choose(
    kernel: Kernel, *, queries: int, keys: int, head_dim: int, itemsize: int, device: Device, wide: bool
) -> Config:
    """Launch parameters of one kernel; whichever of queries and keys are fewer are the agents."""
    table = SIZES[device, kernel, itemsize]
    size = next(table[limit] for limit in sorted(table) if block_d(head_dim) <= limit)
    most = (size.agents, size.tokens) if queries <= keys else (size.tokens, size.agents)
    tile, warps = (tile_length(queries, most[0]), tile_length(keys, most[1])), size.warps
    if device in AMD and kernel != "key":  # a wave feeds on 32 rows, or 16, and few agents are fewer
        warps = max(1, warps * tile[0] // most[0])
    return forced.on(Config(*tile, warps, size.stages, wide))


def chunk_length(total: int, tile: int, programs: int, kind: Literal["tokens", "batch"] = "tokens") -> int:
    """Length of a long axis per program, in whole tiles, if there are `programs` of them without a split."""
    parts = ceil(PROGRAMS / programs)
    chunk = forced.get("chunk", max(MIN_CHUNK[kind], ceil(total / parts)))
    return ceil(chunk / tile) * tile
