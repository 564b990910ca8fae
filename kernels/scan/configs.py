"""Chunks and launch parameters of the kernels of scan attention. Nothing here depends on timing."""

from typing import Literal, NamedTuple

from ..common.launching import AMD, Device, Overrides, block_d, tile_length

Kernel = Literal["solve", "state", "output", "decay"]


class Config(NamedTuple):
    """How one kernel is launched.

    Attributes:
        columns: most features of values that a program makes; of keys in the gradient of the decay.
        warps: warps per program.
        stages: depth of the load pipeline.
        wide: whether offsets inside a batch entry and head take 64 bits.
    """

    columns: int
    warps: int
    stages: int = 1
    wide: bool = False


# tokens of a chunk: (device, bytes of operands) -> {the longer of both head dims up to: tokens}
CHUNKS: dict[tuple[Device, int], dict[int, int]] = {
    ("hopper", 2): {128: 64},
    ("hopper", 4): {64: 32, 128: 16},
    ("ampere", 2): {64: 64, 128: 32},
    ("ampere", 4): {64: 32, 128: 16},
    ("ada", 2): {64: 32, 128: 16},
    ("ada", 4): {128: 16},
}
# (device, kernel, bytes of operands) -> {the longer of both head dims up to: config}
SIZES: dict[tuple[Device, Kernel, int], dict[int, Config]] = {
    ("hopper", "state", 2): {32: Config(32, 4, 2), 64: Config(64, 4, 2), 128: Config(32, 4, 2)},
    ("hopper", "output", 2): {32: Config(32, 4), 64: Config(64, 4), 128: Config(64, 8)},
    ("hopper", "decay", 2): {32: Config(32, 4), 64: Config(32, 8), 128: Config(32, 8)},
    ("hopper", "solve", 4): {32: Config(128, 4), 64: Config(128, 8), 128: Config(128, 8)},
    ("hopper", "state", 4): {32: Config(32, 4), 64: Config(32, 8), 128: Config(32, 8)},
    ("hopper", "output", 4): {32: Config(32, 4), 64: Config(64, 8), 128: Config(32, 8)},
    ("hopper", "decay", 4): {32: Config(16, 4), 64: Config(16, 4), 128: Config(16, 4)},
    ("ampere", "state", 2): {32: Config(32, 4, 2), 64: Config(32, 4), 128: Config(32, 4, 2)},
    ("ampere", "output", 2): {32: Config(32, 4), 64: Config(64, 4), 128: Config(32, 4)},
    ("ampere", "decay", 2): {32: Config(32, 4), 64: Config(32, 8), 128: Config(32, 8)},
    ("ampere", "solve", 4): {32: Config(128, 4), 64: Config(128, 8), 128: Config(128, 8)},
    ("ampere", "state", 4): {32: Config(32, 4), 64: Config(32, 8), 128: Config(16, 8)},
    ("ampere", "output", 4): {32: Config(32, 4), 64: Config(32, 8), 128: Config(32, 8)},
    ("ampere", "decay", 4): {32: Config(16, 4), 64: Config(16, 4), 128: Config(16, 4)},
    ("ada", "state", 2): {32: Config(32, 4, 2), 64: Config(32, 4), 128: Config(16, 4)},
    ("ada", "output", 2): {32: Config(32, 4), 64: Config(32, 4), 128: Config(32, 4)},
    ("ada", "decay", 2): {32: Config(32, 4), 64: Config(32, 8), 128: Config(32, 8)},
    ("ada", "solve", 4): {32: Config(128, 4), 64: Config(128, 8), 128: Config(128, 8)},
    ("ada", "state", 4): {32: Config(32, 4), 64: Config(32, 8), 128: Config(16, 8)},
    ("ada", "output", 4): {32: Config(32, 4), 64: Config(32, 8), 128: Config(16, 8)},
    ("ada", "decay", 4): {32: Config(16, 4), 64: Config(16, 4), 128: Config(16, 4)},
}
# not counted on AMD yet: those of Ada
CHUNKS |= {(amd, size): table for (device, size), table in CHUNKS.items() for amd in AMD if device == "ada"}
SIZES |= {
    (amd, kernel, size): table for (device, kernel, size), table in SIZES.items() if device == "ada" for amd in AMD
}

forced = Overrides(*Config._fields, "chunk")
override = forced.override


def _of_size(table, features: int):
    return next(table[limit] for limit in sorted(table) if block_d(features) <= limit)


def chunk_length(*, tokens: int, features: int, itemsize: int, device: Device) -> int:
    """Tokens of a chunk, a power of two; `features` is the longer head dim, `itemsize` bytes of operands."""
    most = forced.get("chunk", _of_size(CHUNKS[device, itemsize], features))
    return tile_length(tokens, most)


def choose(kernel: Kernel, *, features: int, itemsize: int, device: Device, wide: bool) -> Config:
    """Launch parameters of one kernel; arguments as of `chunk_length`."""
    return forced.on(_of_size(SIZES[device, kernel, itemsize], features)._replace(wide=wide))
