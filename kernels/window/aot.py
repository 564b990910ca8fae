"""Ahead-of-time compilation of the window kernels: every kernel, dtype and pinned size, without a device."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from triton.compiler import ASTSource

from ..launching import Device
from . import configs
from .backward import bias_kernel, key_kernel, query_kernel, window_kernel
from .forward import forward_kernel
from .geometry import Axis
from .launch import constants

GRIDS = {
    "2x2": (Axis(56, 2), Axis(56, 2)),  # many windows in a tile
    "7x7": (Axis(56, 7, 3), Axis(56, 7, 3)),  # one shifted window in a tile
    "8x8+3": (Axis(64, 8, 0, 3, True), Axis(64, 8, 0, 3, True)),  # a halo: many tiles of keys
    "8x7x7": (Axis(16, 8, 4), Axis(56, 7, 3), Axis(56, 7, 3)),  # many tiles of queries and of keys
}
FLAGS = ("", "bias", "bias, wide, grouped")  # wide: 64-bit offsets; grouped: two query heads a key head
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
KERNELS = {"forward": forward_kernel, "window": window_kernel, "query": query_kernel, "key": key_kernel}
HEAD_DIMS = (16, 32, 64, 128, 256)
FLOATS = {"lse_ptr", "dlse_ptr", "delta_ptr", "partial_ptr", "bias_ptr"}


class Tile(NamedTuple):
    """Slots of queries and keys in a tile as the report prints them: windows × slots."""

    queries: tuple[int, int]
    keys: tuple[int, int]


class Variant(NamedTuple):
    """A kernel with all that fixes its machine code; `source` and `options` are what `triton.compile` takes."""

    kernel: str
    grid: str
    dtype: str
    head_dim: int
    flags: str
    config: Tile
    source: ASTSource
    options: dict


def _source(kernel, dtype: str, head_dim: int, rank: int, fixed: dict) -> ASTSource:
    """Arguments as a contiguous call specialises them: aligned pointers, strides divisible by 16, constant ones."""
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name], values[name] = "constexpr", fixed[name]
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in FLOATS else f"*{dtype}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name.endswith("_strides"):
            count = 5 if "lse" in name else 6
            signature[name] = ("i32",) * (count - 1) + ("constexpr",)
            values[(i, count - 1)] = 1
            if count == 6 and head_dim % 16 == 0:
                attributes.update({(i, j): [["tt.divisibility", 16]] for j in range(count - 1)})
        elif name == "lengths":
            signature[name] = ("constexpr",) * (3 - rank) + ("i32",) * rank
            values.update({(i, j): 1 for j in range(3 - rank)})
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    return ASTSource(kernel, signature, values, attributes)


def variants(*, device: Device, tf32: bool) -> Iterator[Variant]:
    """Every kernel on every grid that takes it; the flags at head dim 32 only, the rest with a bias.

    Args:
        device: which table of sizes.
        tf32: whether matrix units take float32 as TF32 only, see `launching.precision`.
    """
    for dtype in TYPES:
        precision = "tf32x3" if tf32 and dtype == torch.float32 else "ieee"
        for grid, axes in GRIDS.items():
            for head_dim in HEAD_DIMS:
                one = configs.in_one_pass(axes, head_dim=head_dim, itemsize=dtype.itemsize, device=device)
                for kernel in ("forward", "window", "bias") if one else ("forward", "query", "key", "bias"):
                    for flags in FLAGS if head_dim == 32 and kernel != "bias" else FLAGS[1:2]:
                        yield _variant(kernel, grid, dtype, head_dim, flags, device, precision)


def _variant(
    kernel, grid: str, dtype: torch.dtype, head_dim: int, flags: str, device: Device, precision: str
) -> Variant:
    axes, bias, wide, group = GRIDS[grid], "bias" in flags, "wide" in flags, 1 + ("grouped" in flags)
    config = configs.choose(kernel, axes, head_dim=head_dim, itemsize=dtype.itemsize, device=device, wide=wide)
    fixed = dict(constants(axes, config, head_dim, precision), GROUP=group)
    options = {name: fixed.pop(name) for name in ("num_warps", "num_stages")}
    if kernel != "bias":
        fixed["BIAS"] = bias
    if kernel == "window":
        fixed["DBIAS"] = bias and group == 1 and configs.sums_bias(config)
    if not bias:
        fixed["bias_ptr"] = None
    if kernel == "window" and not fixed["DBIAS"]:
        fixed["partial_ptr"] = None
    function = {**KERNELS, "bias": bias_kernel}[kernel]
    source = _source(function, TYPES[dtype], head_dim, len(axes), fixed)
    tile = Tile((config.pack, config.queries), (config.pack, config.keys))
    return Variant(kernel, grid, TYPES[dtype], head_dim, flags, tile, source, options)
