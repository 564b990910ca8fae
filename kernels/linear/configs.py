"""Rows of a tile, launch parameters and splits of the kernels of linear attention. Nothing here depends on timing."""

from math import ceil
from typing import Literal, NamedTuple

from ..common.launching import AMD, Device, Overrides, block_d, tile_length

Kernel = Literal["state", "apply", "query", "key"]
PROGRAMS = 1024  # to aim for
# The fewest tokens that one program takes, and as many again for every feature: states that are written cost memory.
MIN_CHUNK: dict[Kernel, tuple[int, int]] = {"state": (256, 4), "query": (256, 4), "apply": (128, 0), "key": (128, 0)}


class Config(NamedTuple):
    """How one kernel is launched.

    Attributes:
        rows: most tokens in a tile, a power of two.
        columns: most features that a program makes, of which it takes all: of the output, of dQ, of dK and dV.
        warps: warps per program.
        stages: depth of the load pipeline.
        wide: whether offsets inside a batch entry and head take 64 bits.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    wide: bool = False


# (device, kernel, element bytes) -> {the longer of both head dims up to: config}
SIZES: dict[tuple[Device, Kernel, int], dict[int, Config]] = {
    ("hopper", "state", 2): {32: Config(64, 32, 4, 3), 64: Config(64, 64, 4, 3), 128: Config(64, 128, 8, 2)},
    ("hopper", "apply", 2): {32: Config(64, 32, 4, 2), 64: Config(64, 64, 8, 1), 128: Config(64, 64, 8, 1)},
    ("hopper", "query", 2): {32: Config(32, 32, 2, 2), 64: Config(32, 64, 4, 1), 128: Config(32, 64, 8, 1)},
    ("hopper", "key", 2): {32: Config(64, 32, 4, 2), 64: Config(64, 64, 4, 1), 128: Config(32, 64, 8, 1)},
    ("ampere", "state", 2): {32: Config(64, 32, 4, 3), 64: Config(32, 64, 4, 3), 128: Config(64, 64, 8, 2)},
    ("ampere", "apply", 2): {32: Config(64, 32, 4, 2), 64: Config(64, 64, 4, 2), 128: Config(32, 64, 4, 1)},
    ("ampere", "query", 2): {32: Config(32, 32, 2, 2), 64: Config(32, 64, 8, 1), 128: Config(32, 32, 8, 1)},
    ("ampere", "key", 2): {32: Config(64, 32, 4, 2), 64: Config(32, 64, 4, 1), 128: Config(32, 64, 8, 1)},
    ("ada", "state", 2): {32: Config(64, 32, 4, 2), 64: Config(32, 64, 8, 2), 128: Config(32, 64, 8, 1)},
    ("ada", "apply", 2): {32: Config(64, 32, 4, 1), 64: Config(32, 64, 4, 1), 128: Config(32, 32, 4, 1)},
    ("ada", "query", 2): {32: Config(32, 32, 4, 1), 64: Config(16, 32, 4, 1), 128: Config(16, 32, 8, 1)},
    ("ada", "key", 2): {32: Config(32, 32, 4, 1), 64: Config(32, 64, 4, 1), 128: Config(16, 32, 8, 1)},
    ("hopper", "state", 4): {32: Config(32, 32, 4, 2), 64: Config(32, 64, 4, 1), 128: Config(16, 64, 8, 1)},
    ("hopper", "apply", 4): {32: Config(32, 32, 4, 1), 64: Config(32, 64, 4, 1), 128: Config(16, 64, 8, 1)},
    ("hopper", "query", 4): {32: Config(32, 32, 4, 1), 64: Config(16, 64, 4, 1), 128: Config(16, 32, 8, 1)},
    ("hopper", "key", 4): {32: Config(32, 32, 4, 1), 64: Config(16, 64, 4, 1), 128: Config(16, 32, 8, 1)},
    ("ampere", "state", 4): {32: Config(32, 32, 4, 2), 64: Config(32, 32, 4, 1), 128: Config(16, 64, 8, 1)},
    ("ampere", "apply", 4): {32: Config(32, 32, 4, 1), 64: Config(32, 64, 4, 1), 128: Config(16, 64, 8, 1)},
    ("ampere", "query", 4): {32: Config(32, 32, 4, 1), 64: Config(16, 32, 4, 1), 128: Config(16, 16, 8, 1)},
    ("ampere", "key", 4): {32: Config(32, 32, 4, 1), 64: Config(16, 64, 4, 1), 128: Config(16, 32, 8, 1)},
    ("ada", "state", 4): {32: Config(32, 32, 4, 1), 64: Config(32, 32, 4, 1), 128: Config(16, 32, 8, 1)},
    ("ada", "apply", 4): {32: Config(32, 32, 4, 1), 64: Config(16, 64, 4, 1), 128: Config(16, 32, 8, 1)},
    ("ada", "query", 4): {32: Config(16, 32, 4, 1), 64: Config(16, 32, 4, 1), 128: Config(16, 16, 8, 1)},
    ("ada", "key", 4): {32: Config(16, 32, 4, 1), 64: Config(16, 32, 4, 1), 128: Config(16, 16, 8, 1)},
}
# not counted on AMD yet: the sizes of Ada
SIZES |= {
    (amd, kernel, size): table for (device, kernel, size), table in SIZES.items() if device == "ada" for amd in AMD
}

forced = Overrides(*Config._fields, "chunk")  # chunk: of every split
override = forced.override


def choose(kernel: Kernel, *, tokens: int, features: int, itemsize: int, device: Device, wide: bool) -> Config:
    """Launch parameters of one kernel; `features` is the longer head dim."""
    table = SIZES[device, kernel, itemsize]
    size = next(table[limit] for limit in sorted(table) if block_d(features) <= limit)
    stages = min(size.stages, 2) if wide else size.stages  # 64-bit offsets need the registers of a third stage
    return forced.on(size._replace(rows=tile_length(tokens, size.rows), stages=stages, wide=wide))


def chunk_length(kernel: Kernel, *, tokens: int, features: int, rows: int, slices: int) -> int:
    """Tokens per program of a slice (a batch entry and a head), in whole tiles."""
    fewest, a_feature = MIN_CHUNK[kernel]
    chunk = forced.get("chunk", max(fewest + a_feature * features, ceil(tokens * slices / PROGRAMS)))
    return ceil(chunk / rows) * rows
