"""Tile sizes and launch parameters of the kernels of scored attention. Nothing here depends on timing."""

from typing import Literal, NamedTuple

from ..common.launching import Device, Overrides, block_d, tile_length

Kernel = Literal["forward", "query", "key"]
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


# (device, kernel) -> {head dim up to: config} of softmax and signed, in half precision
PLAIN: dict[tuple[Device, Kernel], dict[int, Config]] = {
    ("hopper", "forward"): {64: Config(64, 64, 4, 2), 128: Config(64, 64, 4, 2)},
    ("hopper", "query"): {64: Config(64, 64, 4, 2), 128: Config(64, 32, 4, 1)},
    ("hopper", "key"): {64: Config(64, 64, 4, 2), 128: Config(32, 32, 4, 1)},
    ("ampere", "forward"): {64: Config(64, 64, 4, 2), 128: Config(64, 32, 4, 2)},
    ("ampere", "query"): {64: Config(64, 32, 4, 2), 128: Config(32, 32, 4, 1)},
    ("ampere", "key"): {64: Config(32, 64, 4, 1), 128: Config(32, 32, 4, 1)},
    ("amd", "forward"): {64: Config(64, 64, 2, 1), 128: Config(64, 32, 2, 1)},
    ("amd", "query"): {64: Config(64, 32, 2, 1), 128: Config(32, 32, 1, 1)},
    ("amd", "key"): {64: Config(32, 64, 2, 1), 128: Config(32, 32, 1, 1)},
}
# likewise of the other formulas, which hold more tiles of numbers; CoPE takes one stage: Triton 3.8 on Hopper refuses
# to pipeline its loads by position, since a product comes before them
MORE: dict[tuple[Device, Kernel], dict[int, Config]] = {
    ("hopper", "forward"): {64: Config(64, 32, 4, 1), 128: Config(64, 32, 4, 1)},
    ("hopper", "query"): {64: Config(64, 32, 4, 1), 128: Config(32, 32, 4, 1)},
    ("hopper", "key"): {32: Config(16, 64, 4, 1), 128: Config(32, 32, 4, 1)},
    ("ampere", "forward"): {64: Config(64, 32, 4, 1), 128: Config(32, 32, 4, 1)},
    ("ampere", "query"): {32: Config(64, 32, 4, 1), 128: Config(32, 32, 4, 1)},
    ("ampere", "key"): {32: Config(16, 64, 4, 1), 128: Config(32, 32, 4, 1)},
    ("amd", "forward"): {64: Config(32, 32, 1, 1), 128: Config(32, 32, 1, 1)},
    ("amd", "query"): {64: Config(32, 32, 1, 1), 128: Config(32, 32, 1, 1)},
    ("amd", "key"): {64: Config(32, 32, 1, 1), 128: Config(32, 32, 1, 1)},
}
# likewise of one formula that has room for more, or needs more than the others; head dim 32 of CoPE repeats products
OWN: dict[tuple[str, Device, Kernel], dict[int, Config]] = {
    ("cope", "hopper", "forward"): {64: Config(64, 32, 4, 1), 128: Config(32, 32, 4, 1)},
    ("cope", "hopper", "query"): {128: Config(32, 32, 4, 1)},
    ("cope", "ampere", "query"): {128: Config(32, 32, 4, 1)},
    ("cope", "amd", "query"): {64: Config(32, 32, 1, 1), 128: Config(16, 32, 1, 1)},
    ("parallax", "hopper", "forward"): {64: Config(64, 64, 4, 2), 128: Config(64, 32, 4, 1)},
    ("parallax", "hopper", "key"): {64: Config(32, 64, 4, 1), 128: Config(32, 16, 4, 1)},
    ("parallax", "amd", "key"): {64: Config(32, 32, 1, 1), 128: Config(16, 32, 1, 1)},
    ("softplus", "hopper", "forward"): {64: Config(64, 64, 4, 2), 128: Config(64, 32, 4, 1)},
    ("softplus", "hopper", "query"): {128: Config(64, 32, 4, 1)},
}
LIKE: dict[Device, Device] = {"ada": "ampere", "rdna": "amd"}
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
    like = LIKE.get(device, device)
    of_half = OWN.get((kind, like, kernel)) or (PLAIN if kind in ("softmax", "signed") else MORE)[like, kernel]
    table = SINGLE[kernel] if itemsize == 4 else of_half
    size = next(table[limit] for limit in sorted(table) if block_d(head_dim) <= limit)
    size = size._replace(queries=tile_length(queries, size.queries), keys=tile_length(keys, size.keys), wide=wide)
    return forced.on(size)
