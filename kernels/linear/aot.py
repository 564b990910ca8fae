"""Ahead-of-time compilation of the kernels of linear attention: every kernel, dtype and size, without a device."""

from collections.abc import Iterator

import torch
from triton.compiler import ASTSource

from ..common.launching import Device
from ..tools.variants import TYPES, Variant, source
from . import configs
from .backward import key_kernel, query_kernel
from .call import LinearCall
from .forward import apply_kernel, state_kernel
from .launch import constants, flags

TOKENS = 3136
HEAD_DIMS = {"32": (32, 32), "48": (48, 48), "64": (64, 64), "128": (128, 128), "128 of 64": (64, 128)}
VARIANTS = {  # wide: three strided axes and 64-bit offsets
    "": LinearCall(),
    "floor": LinearCall(relu=True, floor=100.0),
    "eps, wide": LinearCall(mean=True, eps=1e-6),
    "centered": LinearCall(mean=True, centered=True),
}
KERNELS: dict[configs.Kernel, object] = {
    "state": state_kernel,
    "apply": apply_kernel,
    "query": query_kernel,
    "key": key_kernel,
}


def _source(kernel, dtype: str, fixed: dict, *, wide: bool, scales: bool) -> ASTSource:
    """Arguments as a contiguous call gives them."""
    floats = dict.fromkeys(("state_ptr", "dstate_ptr", "scale_ptr"), "fp32")
    integers: dict = {}
    for name in kernel.arg_names:
        if name.endswith("_inner"):
            integers[name] = (0, 0) if wide else (1, 1)
        elif name.endswith("_strides"):
            integers[name] = (16,) * 5 + (1,)
    if not scales:
        fixed = fixed | {"scale_ptr": None}
    return source(kernel, dtype, fixed, pointers=floats, integers=integers, floats=("scale", "share", "floor"))


def variants(*, device: Device, tf32: bool, descriptors: bool) -> Iterator[Variant]:
    """Every kernel with every size of the pinned table.

    Args:
        device: which table of sizes.
        tf32: whether matrix units take float32 as TF32 only, see `launching.precision`.
        descriptors: whether the device has tensor descriptors.
    """
    for dtype in TYPES:
        precision = "tf32x3" if tf32 and dtype == torch.float32 else "ieee"
        state_precision = precision if dtype == torch.float32 or not tf32 else "tf32"
        for name in KERNELS:
            for grid in HEAD_DIMS:
                for variant in VARIANTS if grid == "64" else ("", "floor"):
                    yield _variant(name, grid, variant, dtype, device, precision, state_precision)


def _variant(
    name: configs.Kernel, grid: str, variant: str, dtype, device: Device, precision: str, state_precision: str
) -> Variant:
    kernel, call, (head_dim, value_dim) = KERNELS[name], VARIANTS[variant], HEAD_DIMS[grid]
    wide, scales = "wide" in variant, variant == "floor"
    sizes = dict(tokens=TOKENS, features=max(head_dim, value_dim), itemsize=dtype.itemsize, device=device)
    config = configs.choose(name, **sizes, wide=wide)
    fixed = constants(name, config, head_dim, value_dim, precision, state_precision) | flags(name, call, scales)
    launch = {option: fixed.pop(option) for option in ("num_warps", "num_stages")}
    made = _source(kernel, TYPES[dtype], fixed, wide=wide, scales=scales)
    tiles = ((), (config.rows,)) if name in ("state", "key") else ((config.rows,), ())
    return Variant(name, grid, TYPES[dtype], head_dim, variant, *tiles, made, launch)
