"""Tile sizes of the window kernels, pinned: nothing here depends on timing, so a call always takes the same kernel."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Literal, NamedTuple

from ..launching import Device
from .geometry import Axis

Kernel = Literal["forward", "window", "query", "key", "bias"]
MIN_TILE = 16  # rows; the smallest side of a matrix instruction


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


# (element bytes) -> {head dim up to: (rows of a tile of queries, of keys, warps)}
FORWARD = {2: {64: (64, 64, 4), 128: (64, 32, 4), 256: (32, 32, 4)}, 4: {32: (32, 32, 4), 256: (16, 16, 4)}}
BACKWARD = {2: {32: (64, 64, 8), 128: (32, 32, 4), 256: (16, 16, 4)}, 4: {32: (32, 32, 8), 256: (16, 16, 4)}}
SMALL_BACKWARD = {2: {128: (32, 32, 4), 256: (16, 16, 4)}, 4: {256: (16, 16, 4)}}  # less memory a program, or AMD

_overrides: dict[str, object] = {}


@contextmanager
def override(**fields) -> Iterator[None]:
    """Force fields of every `Config`, or `rows`, the most rows of a tile, inside the block: for tuning and for tests.

    Raises:
        TypeError: a name that is neither.
    """
    unknown = set(fields) - {"warps", "wide", "rows"}
    if unknown:
        raise TypeError(f"override() got {sorted(unknown)}; accepted: ['warps', 'wide', 'rows']")
    before = dict(_overrides)
    _overrides.update(fields)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def block_d(head_dim: int) -> int:
    """Head dim as the kernels hold it: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def choose(
    kernel: Kernel, axes: tuple[Axis, ...], *, head_dim: int, itemsize: int, device: Device, wide: bool
) -> Config:
    """Launch parameters of one kernel: as many windows as fill a tile, or as many slots of one window as fit."""
    small = device == "small" or (device == "ampere" and kernel == "key")
    table = (FORWARD if kernel == "forward" else SMALL_BACKWARD if small else BACKWARD)[itemsize]
    rows, columns, warps = next(table[limit] for limit in sorted(table) if block_d(head_dim) <= limit)
    if isinstance(forced := _overrides.get("rows"), int):
        rows = columns = forced
    tokens, keys = _power(prod(a.window for a in axes)), _power(prod(a.span for a in axes))
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
    return config._replace(**{name: value for name, value in _overrides.items() if name != "rows"})


def in_one_pass(axes: tuple[Axis, ...], *, head_dim: int, itemsize: int, device: Device) -> bool:
    """Whether one kernel computes all gradients: a window owns its keys and fits into a tile."""
    config = choose("window", axes, head_dim=head_dim, itemsize=itemsize, device=device, wide=False)
    tokens = prod(a.window for a in axes)
    return not any(a.halo for a in axes) and config.queries == config.keys >= tokens


def sums_bias(config: Config) -> bool:
    """Whether the one pass also sums the gradient of the bias: registers hold that of windows of few tokens only."""
    return config.queries < 64
