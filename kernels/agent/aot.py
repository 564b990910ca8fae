"""Ahead-of-time compilation of the kernels of agent attention: every kernel, dtype and size, without a device."""

from collections.abc import Iterator

import torch
from triton.compiler import ASTSource

from ..common.launching import Device
from ..tools.variants import TYPES, Variant, source
from . import configs
from .backward import bias_kernel, key_kernel, query_kernel
from .forward import forward_kernel, merge_kernel
from .launch import bias_constants, constants, merge_constants

GRIDS = {  # queries, keys
    "gather": (49, 3136),  # agents over keys
    "gather few": (9, 3136),
    "spread": (3136, 49),  # queries over agents
}
# grid: three strided axes; wide: 64-bit offsets; values: of VALUE_DIM features a head
FLAGS = ("", "bias", "bias, grid, wide", "ones", "bias, values")
VALUE_DIM = 256
KERNELS = {"forward": forward_kernel, "query": query_kernel, "key": key_kernel, "bias": bias_kernel}


def _source(kernel, dtype: str, head_dim: int, fixed: dict, flags: str, parts: bool) -> ASTSource:
    """Arguments as a contiguous call gives them; with `parts` the results are partial sums."""
    floats = {"lse_ptr", "delta_ptr", "dbias_ptr", "bias_ptr", "parts_ptr", "part_lse_ptr"}
    if parts:
        floats |= {"out_ptr"} if kernel is forward_kernel else {"dq_ptr", "dk_ptr", "dv_ptr"}
    integers: dict = dict.fromkeys(("batches", "heads"), 1) if "ones" in flags else {}
    for name in kernel.arg_names:
        if name.endswith("_inner"):
            integers[name] = (0, 0) if "grid" in flags else (1, 1)
        elif name.endswith("_strides"):
            integers[name] = (0, 0, 1) if name == "bias_strides" else (16,) * 5 + (1,)
    return source(kernel, dtype, fixed, pointers=dict.fromkeys(floats, "fp32"), integers=integers)


def variants(*, device: Device, tf32: bool, descriptors: bool) -> Iterator[Variant]:
    """Every kernel with every size of the pinned table in both passes.

    Args:
        device: which table of sizes.
        tf32: whether matrix units take float32 as TF32 only, see `launching.precision`.
        descriptors: whether the device has tensor descriptors.
    """
    for dtype in TYPES:
        precision = "tf32x3" if tf32 and dtype == torch.float32 else "ieee"
        for (table_device, kernel, itemsize), table in configs.SIZES.items():
            if (table_device, itemsize) == (device, dtype.itemsize):
                for head_dim in table:
                    for grid in GRIDS:
                        yield from _pass_variants(kernel, grid, dtype, head_dim, device, precision)
        for head_dim in (64, 256):
            made = _source(merge_kernel, TYPES[dtype], head_dim, merge_constants(head_dim, False), "", True)
            yield Variant("merge", "gather", TYPES[dtype], head_dim, "", (), (), made, {})


def _pass_variants(
    kernel: configs.Kernel, grid: str, dtype, head_dim: int, device: Device, precision: str
) -> Iterator[Variant]:
    queries, keys = GRIDS[grid]
    for flags in FLAGS if head_dim == 64 else FLAGS[:2]:
        bias, value_dim = "bias" in flags, VALUE_DIM if "values" in flags else head_dim
        if kernel == "bias" and not bias:
            continue
        sizes = dict(queries=queries, keys=keys, head_dim=max(head_dim, value_dim), itemsize=dtype.itemsize)
        config = configs.choose(kernel, **sizes, device=device, wide="wide" in flags)
        fixed = constants(config, head_dim, value_dim, precision)
        fixed |= bias_constants(head_dim, value_dim, dtype.itemsize) if kernel == "bias" else {"BIAS": bias}
        if kernel == "query":
            fixed["WHOLE"] = keys <= config.keys
        if not bias:
            fixed["bias_ptr"] = None
        options = {name: fixed.pop(name) for name in ("num_warps", "num_stages")}
        # the long axis is split in the pass and the kernel that sum over it
        parts = (kernel == "key") == (grid == "spread")
        made = _source(KERNELS[kernel], TYPES[dtype], head_dim, fixed, flags, parts)
        tiles = (config.queries,), (config.keys,)
        yield Variant(kernel, grid, TYPES[dtype], head_dim, flags, *tiles, made, options)
