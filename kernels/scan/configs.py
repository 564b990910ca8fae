"""Chunks and launch parameters of the kernels of scan attention. Nothing here depends on timing."""

from typing import Literal, NamedTuple

from ..common.launching import Device, Overrides, block_d, tile_length

Kernel = Literal["solve", "state", "output"]


class Config(NamedTuple):
    """How one kernel is launched.

    Attributes:
        columns: most features of values that a program makes.
        warps: warps per program.
        stages: depth of the load pipeline.
        wide: whether offsets inside a batch entry and head take 64 bits.
    """

    columns: int
    warps: int
    stages: int = 1
    wide: bool = False


# tokens of a chunk: (device, bytes of the widest operand) -> {the longer of both head dims up to: tokens}
CHUNKS: dict[tuple[Device, int], dict[int, int]] = {
    ("hopper", 2): {128: 64},
    ("hopper", 4): {64: 32, 128: 32},
    ("ampere", 2): {64: 64, 128: 32},
    ("ampere", 4): {64: 32, 128: 16},
    ("small", 2): {64: 32, 128: 16},
    ("small", 4): {64: 16, 128: 16},
}
# (device, kernel) -> {the longer of both head dims up to: config}
SIZES: dict[tuple[Device, Kernel], dict[int, Config]] = {
    ("hopper", "solve"): {64: Config(128, 4), 128: Config(128, 8)},
    ("hopper", "state"): {32: Config(32, 4, 2), 64: Config(64, 4, 2), 128: Config(32, 4, 2)},
    ("hopper", "output"): {32: Config(32, 4), 64: Config(64, 4), 128: Config(64, 8)},
    ("ampere", "solve"): {64: Config(128, 4), 128: Config(128, 8)},
    ("ampere", "state"): {32: Config(32, 4, 2), 64: Config(32, 4, 2), 128: Config(32, 4, 2)},
    ("ampere", "output"): {32: Config(32, 4), 64: Config(64, 4), 128: Config(32, 8)},
    ("small", "solve"): {64: Config(128, 4), 128: Config(128, 8)},
    ("small", "state"): {32: Config(32, 4, 2), 64: Config(32, 4, 1), 128: Config(16, 4, 1)},
    ("small", "output"): {32: Config(32, 4), 64: Config(32, 4), 128: Config(32, 4)},
}

forced = Overrides(*Config._fields, "chunk")
override = forced.override


def _of_size(table, features: int):
    return next(table[limit] for limit in sorted(table) if block_d(features) <= limit)


def chunk_length(*, tokens: int, features: int, itemsize: int, device: Device) -> int:
    """Tokens of a chunk, a power of two; `features` is the longer head dim, `itemsize` that of the widest operand."""
    most = forced.get("chunk", _of_size(CHUNKS[device, itemsize], features))
    return tile_length(tokens, most)


def choose(kernel: Kernel, *, features: int, device: Device, wide: bool) -> Config:
    """Launch parameters of one kernel; `features` is the longer head dim."""
    return forced.on(_of_size(SIZES[device, kernel], features)._replace(wide=wide))
