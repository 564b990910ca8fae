"""Tile sizes of the window kernels, pinned: nothing here depends on timing, so a call always takes the same kernel."""

from math import prod
from typing import Literal, NamedTuple

from ..common.launching import AMD, MIN_TILE, Device, Overrides, block_d
from .geometry import Axis

Kernel = Literal["forward", "window", "query", "key", "bias"]


class Config(NamedTuple):
    """How one kernel is launched.

    Attributes:
        pack: windows per tile.
        queries, keys: slots of each of them per tile, powers of two.
        warps: warps per program.
        stages: depth of the load pipeline; the backward has no registers for more than one.
        wide: whether offsets inside a batch and head take 64 bits.
    """

    pack: int
    queries: int
    keys: int
    warps: int
    stages: int
    wide: bool


# (element bytes) -> {head dim up to: (rows of a tile of queries, of keys, warps)}; other warps on AMD, see `choose`
FORWARD = {
    2: {64: (64, 64, 4), 128: (64, 32, 4), 256: (32, 32, 4)},
    4: {32: (32, 32, 4), 128: (16, 16, 4), 256: (16, 16, 8)},
}
BACKWARD = {2: {32: (64, 64, 4), 256: (32, 32, 4)}, 4: {128: (16, 16, 4), 256: (16, 16, 8)}}
BIAS = {2: {32: (64, 64, 4), 64: (32, 32, 2), 256: (16, 16, 1)}, 4: {32: (16, 16, 4), 256: (16, 16, 8)}}
SIZES = {"forward": FORWARD, "window": BACKWARD, "query": BACKWARD, "key": BACKWARD, "bias": BIAS}
# less memory a program, or AMD
SMALL_BACKWARD = {2: {256: (32, 32, 4)}, 4: {128: (16, 16, 4), 256: (16, 16, 8)}}

forced = Overrides(*Config._fields, "rows", "one_pass")  # the most rows of a tile; one backward kernel where it fits
override = forced.override


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def choose(
    kernel: Kernel, axes: tuple[Axis, ...], *, head_dim: int, itemsize: int, device: Device, wide: bool
) -> Config:
    """Launch parameters of one kernel: as many windows as fill a tile, or as many slots of one window as fit."""
    of_amd = device in AMD
    small = device == "ada" or of_amd or (device == "ampere" and kernel == "key")
    sizes = (SMALL_BACKWARD if small and kernel != "forward" else SIZES[kernel])[itemsize]
    rows, columns, warps = next(sizes[limit] for limit in sorted(sizes) if block_d(head_dim) <= limit)
    if kernel == "key" and itemsize == 2 and block_d(head_dim) > (64 if of_amd else 128):
        columns = 16  # two gradients of so many features fill the registers
        rows = 16 if of_amd and block_d(head_dim) > 128 else rows
    if of_amd and itemsize == 2:
        warps = max(1, rows // (32 if device == "amd" else 16))  # rows that a wave feeds on
    if isinstance(most := forced.get("rows"), int):
        rows = columns = most
    tokens, keys = _power(prod([a.window for a in axes])), _power(prod([a.span for a in axes]))
    pack = 1
    if kernel in ("forward", "window", "query") and max(tokens, keys) < min(rows, columns):
        pack = min(rows, columns) // max(tokens, keys)
        tokens = keys = max(tokens, keys)
    if kernel == "key":  # it tiles a cell of keys, of the size of a window
        keys = tokens
    config = Config(
        pack=pack,
        queries=min(rows, max(tokens, MIN_TILE // pack)),
        keys=min(columns, max(keys, MIN_TILE // pack)),
        warps=warps,
        stages=2 if kernel == "forward" else 1,
        wide=wide,
    )
    return forced.on(config)


def in_one_pass(axes: tuple[Axis, ...], *, head_dim: int, itemsize: int, device: Device) -> bool:
    """Return whether one kernel computes all gradients: a window owns its keys and fits into a tile of registers."""
    config = choose("window", axes, head_dim=head_dim, itemsize=itemsize, device=device, wide=False)
    fits = not any(a.halo for a in axes) and config.queries == config.keys >= prod([a.window for a in axes])
    return fits and bool(forced.get("one_pass", itemsize <= 2 and block_d(head_dim) <= 64))


def sums_bias(config: Config) -> bool:
    """Return whether the one pass also sums the gradient of the bias: registers hold that of small windows only."""
    return config.queries < 64
