"""Ahead-of-time compilation of the window kernels: every kernel, dtype and pinned size, without a device."""

from collections.abc import Iterator

import torch
from triton.compiler import ASTSource

from ..common.launching import Device
from ..tools.variants import NARROW_DIMS, TYPES, Variant, row_strides, source
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
# wide: 64-bit offsets; grouped: two query heads a key head; values: of VALUE_DIM features a head
FLAGS = ("", "bias", "bias, wide, grouped", "bias, values")
VALUE_DIM = 128
GRADIENTS = {"forward": (), "window": ("dq_strides", "dv_strides"), "query": ("dq_strides",), "key": ("dv_strides",)}
GRADIENTS |= {"bias": ()}
KERNELS = {"forward": forward_kernel, "window": window_kernel, "query": query_kernel, "key": key_kernel}
HEAD_DIMS = (16, 32, 64, 128, 256)
FLOATS = dict.fromkeys(("lse_ptr", "dlse_ptr", "delta_ptr", "partial_ptr", "bias_ptr"), "fp32")


def _source(kernel, dtype: str, head_dim: int, rank: int, fixed: dict) -> ASTSource:
    """Arguments as a contiguous call gives them."""
    rows = row_strides(head_dim, dtype, 5)
    strides = {n: (0,) * 4 + (1,) if "lse" in n else rows for n in kernel.arg_names if "_strides" in n}
    lengths = (1,) * (3 - rank) + (0,) * rank
    return source(kernel, dtype, fixed, pointers=FLOATS, integers={"lengths": lengths} | strides)


def variants(*, device: Device, tf32: bool, descriptors: bool) -> Iterator[Variant]:
    """Every kernel on every grid that takes it; the flags at head dim 32 only, the rest with a bias.

    Args:
        device: which table of sizes.
        tf32: whether matrix units take float32 as TF32 only, see `launching.precision`.
        descriptors: whether the device has tensor descriptors.
    """
    for dtype in TYPES:
        precision = "tf32x3" if tf32 and dtype == torch.float32 else "ieee"
        for grid, axes in GRIDS.items():
            narrow = NARROW_DIMS if dtype.itemsize == 2 and grid in ("7x7", "8x8+3") else ()
            for head_dim in HEAD_DIMS + narrow:
                one = configs.in_one_pass(axes, head_dim=head_dim, itemsize=dtype.itemsize, device=device)
                for kernel in ("forward", "window", "bias") if one else ("forward", "query", "key", "bias"):
                    for flags in FLAGS[:3] if head_dim == 32 and kernel != "bias" else FLAGS[1:2]:
                        yield _variant(kernel, grid, dtype, head_dim, head_dim, flags, device, precision)
                    if head_dim == VALUE_DIM:  # the longer row chooses the kernels and sizes
                        yield _variant(kernel, grid, dtype, 32, VALUE_DIM, FLAGS[3], device, precision)


def _variant(
    kernel, grid: str, dtype: torch.dtype, head_dim: int, value_dim: int, flags: str, device: Device, precision: str
) -> Variant:  # fmt: skip
    axes, bias, wide, group = GRIDS[grid], "bias" in flags, "wide" in flags, 1 + ("grouped" in flags)
    sizes = dict(head_dim=max(head_dim, value_dim), itemsize=dtype.itemsize, device=device)
    config = configs.choose(kernel, axes, **sizes, wide=wide)
    fixed = dict(constants(axes, config, head_dim, value_dim, precision), GROUP=group)
    options = {name: fixed.pop(name) for name in ("num_warps", "num_stages")}
    if kernel != "bias":
        fixed["BIAS"] = bias
    if kernel == "window":
        fixed["DBIAS"] = bias and group == 1 and configs.sums_bias(config)
    if not bias:
        fixed["bias_ptr"] = None
    if kernel == "window" and not fixed["DBIAS"]:
        fixed["partial_ptr"] = None
    if head_dim == value_dim:
        fixed |= dict.fromkeys(GRADIENTS[kernel])
    function = {**KERNELS, "bias": bias_kernel}[kernel]
    made = _source(function, TYPES[dtype], head_dim, len(axes), fixed)
    tiles = (config.pack, config.queries), (config.pack, config.keys)  # windows, slots
    return Variant(kernel, grid, TYPES[dtype], head_dim, flags, *tiles, made, options)
