"""Tile sizes and launch parameters of the kernels of scored attention. Nothing here depends on timing."""

from typing import Literal, NamedTuple

from ..common.launching import Device, Overrides, block_d, tile_length

Kernel = Literal["forward", "query", "key"]
MANY = ("cope", "parallax", "softplus")  # formulas with more tiles of numbers than a softmax
COPE_KEYS = {2: 32, 4: 16}  # by element bytes, the fewest keys in a tile of the backward kernels of CoPE


class Config(NamedTuple):
    """How one kernel is launched.

    Attributes:
        queries, keys: most tokens in a tile of queries and of keys, powers of two.
        warps: warps per program.
        stages: depth of the load pipeline.
        wide: whether offsets inside a batch entry and head take 64 bits.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    wide: bool = False


# (device, kernel, formulas of MANY) -> {head dim up to: config}, of half precision
HALF: dict[tuple[Device, Kernel, bool], dict[int, Config]] = {
    ("hopper", "forward", False): {64: Config(64, 64, 4, 2), 128: Config(64, 64, 4, 2)},
    ("hopper", "query", False): {64: Config(64, 64, 4, 2), 128: Config(64, 64, 4, 1)},
    ("hopper", "key", False): {64: Config(64, 64, 4, 2), 128: Config(32, 64, 4, 1)},
    ("hopper", "forward", True): {64: Config(64, 64, 4, 2), 128: Config(64, 32, 4, 1)},
    ("hopper", "query", True): {64: Config(64, 32, 4, 1), 128: Config(64, 32, 4, 1)},
    ("hopper", "key", True): {64: Config(32, 64, 4, 1), 128: Config(32, 64, 4, 1)},
    ("ampere", "forward", False): {64: Config(64, 64, 4, 2), 128: Config(64, 32, 4, 2)},
    ("ampere", "query", False): {64: Config(64, 32, 4, 2), 128: Config(32, 32, 2, 1)},
    ("ampere", "key", False): {64: Config(32, 64, 4, 2), 128: Config(32, 64, 4, 1)},
    ("ampere", "forward", True): {64: Config(64, 32, 4, 1), 128: Config(64, 32, 4, 1)},
    ("ampere", "query", True): {64: Config(32, 32, 2, 1), 128: Config(32, 32, 4, 1)},
    ("ampere", "key", True): {64: Config(32, 32, 2, 1), 128: Config(32, 32, 4, 1)},
    ("amd", "forward", False): {64: Config(64, 64, 2, 1), 128: Config(64, 32, 2, 1)},
    ("amd", "query", False): {64: Config(64, 32, 2, 1), 128: Config(32, 32, 1, 1)},
    ("amd", "key", False): {64: Config(32, 64, 2, 1), 128: Config(32, 32, 1, 1)},
    ("amd", "forward", True): {64: Config(64, 32, 2, 1), 128: Config(32, 32, 1, 1)},
    ("amd", "query", True): {64: Config(32, 32, 1, 1), 128: Config(32, 32, 1, 1)},
    ("amd", "key", True): {64: Config(32, 32, 1, 1), 128: Config(32, 32, 1, 1)},
}
for other, like in (("ada", "ampere"), ("rdna", "amd")):
    HALF |= {(other, kernel, many): table for (device, kernel, many), table in HALF.items() if device == like}
# of float32, on any device
SINGLE: dict[Kernel, dict[int, Config]] = {
    "forward": {64: Config(32, 32, 4, 1), 128: Config(16, 16, 4, 1)},
    "query": {128: Config(16, 16, 4, 1)},
    "key": {128: Config(16, 16, 4, 1)},
}

forced = Overrides(*Config._fields)
override = forced.override


def choose(
    kernel: Kernel, kind: str, *, queries: int, keys: int, head_dim: int, itemsize: int, device: Device, wide: bool
) -> Config:
    """Launch parameters of one kernel; `head_dim` is the longer one, `kind` the formula.

    The backward kernels of CoPE share their tiles: one reads what the other left for each.
    """
    if kind == "cope" and kernel == "key":
        kernel = "query"
    table = SINGLE[kernel] if itemsize == 4 else HALF[device, kernel, kind in MANY]
    size = next(table[limit] for limit in sorted(table) if block_d(head_dim) <= limit)
    size = size._replace(queries=tile_length(queries, size.queries), keys=tile_length(keys, size.keys), wide=wide)
    return forced.on(size)
