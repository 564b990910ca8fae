"""Ahead-of-time compilation of the kernels of scan attention: every kernel, dtype and size, without a device."""

from collections.abc import Iterator

import torch

from ..common.launching import Device
from ..tools.variants import TYPES, Variant, source
from . import configs
from .backward import decay_kernel
from .forward import output_kernel, solve_kernel, state_kernel
from .passes import constants

TOKENS = 3136
HEAD_DIMS = {"32": (32, 32), "48": (48, 48), "64": (64, 64), "128": (128, 128), "64 to 128": (64, 128)}
VARIANTS = {  # wide: three strided axes and 64-bit offsets
    "": {"DECAY": True},
    "no decay": {},
    "delta": {"DECAY": True, "DELTA": True},
    "strict, reverse, wide": {"DECAY": True, "STRICT": True, "REVERSE": True, "FIRST": True},
}
KERNELS: dict[configs.Kernel, object] = {
    "solve": solve_kernel,
    "state": state_kernel,
    "output": output_kernel,
    "decay": decay_kernel,
}
FLAGS: dict[configs.Kernel, tuple[str, ...]] = {
    "solve": ("DECAY", "REVERSE"),
    "state": ("DECAY", "DELTA", "FIRST", "REVERSE"),
    "output": ("DECAY", "STRICT", "REVERSE"),
    "decay": ("DELTA", "REVERSE"),
}
ALWAYS_FLOAT = ("decay_ptr", "beta_ptr", "w_ptr", "first_ptr", "states_ptr", "ends_ptr", "last_ptr", "written_ptr")


def variants(*, device: Device, tf32: bool, descriptors: bool) -> Iterator[Variant]:
    """Every kernel with every size of the pinned table.

    Args:
        device: which table of sizes.
        tf32: whether matrix units take float32 as TF32 only, see `launching.precision`.
        descriptors: whether the device has tensor descriptors, which these kernels do not use.
    """
    for dtype in TYPES:
        for name in KERNELS:
            for grid in HEAD_DIMS:
                for variant in VARIANTS if grid == "64" else ("", "delta"):
                    if (name != "solve" or variant == "delta") and (name != "decay" or variant != "no decay"):
                        yield _variant(name, grid, variant, dtype, device, tf32)


def _variant(name: configs.Kernel, grid: str, variant: str, dtype, device: Device, tf32: bool) -> Variant:
    kernel, (head_dim, value_dim), given = KERNELS[name], HEAD_DIMS[grid], VARIANTS[variant]
    delta, wide = "DELTA" in given, "wide" in variant
    sizes = dict(features=max(head_dim, value_dim), itemsize=4 if delta else dtype.itemsize, device=device)
    rows = configs.chunk_length(**sizes, tokens=TOKENS)
    config = configs.choose(name, **sizes, wide=wide)
    fixed = constants(name, config, rows, head_dim, value_dim) | {flag: given.get(flag, False) for flag in FLAGS[name]}
    fixed["PRECISION"] = "ieee" if not tf32 else "tf32x3" if dtype == torch.float32 else "tf32"
    if name != "solve":
        fixed["WIDEN"] = delta
    missing = {"decay_ptr": not given.get("DECAY", False), "first_ptr": not given.get("FIRST", False)}
    missing |= dict.fromkeys(("w_ptr", "written_ptr", "dv_ptr"), not delta) if name != "solve" else {}
    fixed |= {argument: None for argument, without in missing.items() if without and argument in kernel.arg_names}  # pyright: ignore[reportAttributeAccessIssue]
    floats = dict.fromkeys(ALWAYS_FLOAT, "fp32")
    if name in ("solve", "decay"):
        floats["out_ptr" if name == "decay" else "u_ptr"] = "fp32"
    if delta and name != "solve":  # solutions of equations are float32
        floats |= dict.fromkeys(("v_ptr", "u_ptr", "dv_ptr"), "fp32")
    integers: dict = {}
    for argument in kernel.arg_names:  # pyright: ignore[reportAttributeAccessIssue]
        if argument.endswith("_inner"):
            integers[argument] = (0, 0) if wide else (1, 1)
        elif argument.endswith("_strides"):
            integers[argument] = (16,) * 5 + (1,)
    launch = {option: fixed.pop(option) for option in ("num_warps", "num_stages")}
    numbers = ("factor", "near", "far", "scale")
    made = source(kernel, TYPES[dtype], fixed, pointers=floats, integers=integers, floats=numbers)  # pyright: ignore[reportArgumentType]
    return Variant(name, grid, TYPES[dtype], head_dim, variant, (rows,), (), made, launch)
