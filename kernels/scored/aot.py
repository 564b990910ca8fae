"""Ahead-of-time compilation of the kernels of scored attention: every kernel, dtype and size, without a device."""

from collections.abc import Iterator

import torch

from ..common.launching import Device, block_d
from ..tools.variants import TYPES, Variant, source
from . import configs
from .backward import key_kernel, query_kernel
from .call import passes
from .forward import count_kernel, forward_kernel
from .launch import constants, formula

TOKENS = 4096
POSITIONS = 64  # of CoPE's table
FORMULAS = {  # name: kind, power, length scale
    "softmax": ("softmax", 0.0, False),
    "signed": ("signed", 0.0, False),
    "softplus": ("softplus", 0.0, True),
    "power": ("softplus", 3.0, False),
    "cope": ("cope", 0.0, False),
    "parallax": ("parallax", 0.0, False),
}
FLAGS = ("", "mask", "mask, wide")  # mask: two intervals a key; wide: three strided axes and 64-bit offsets
KERNELS: dict[configs.Kernel, object] = {"forward": forward_kernel, "query": query_kernel, "key": key_kernel}
ALWAYS_FLOAT = ("known_ptr", "lse_ptr", "dlse_ptr", "stat_ptr", "delta_ptr", "sum_ptr", "later_ptr", "dknown_ptr")
ALWAYS_INTEGER = ("interval_ptr", "position_ptr", "list_ptr")
NUMBERS = ("scale", "length", "power", "offset")


def variants(*, device: Device, tf32: bool, descriptors: bool) -> Iterator[Variant]:
    """Every kernel with every size of the pinned table and every formula.

    Args:
        device: which table of sizes.
        tf32: whether matrix units take float32 as TF32 only, see `launching.precision`.
        descriptors: whether the device has tensor descriptors, which these kernels do not use.
    """
    for dtype in TYPES:
        precision = "tf32x3" if tf32 and dtype == torch.float32 else "ieee"
        for name in KERNELS:
            for what, (kind, power, length) in FORMULAS.items():
                for head_dim in (32, 64, 128):
                    for flags in FLAGS if head_dim == 64 else FLAGS[:1]:
                        sweeps = passes(kind, power, backward=name == "query") if name != "key" else ("",)
                        for sweep in sweeps:
                            grid = what if sweep != "sums" else f"{what} sums"
                            options = dict(power=power, length_scale=length)
                            yield _variant(name, grid, kind, options, sweep, dtype, head_dim, flags, device, precision)
    config = _config("forward", "softplus", 2, 64, device, False)
    fixed = dict(QUERIES=config.queries, KEYS=config.keys, INTERVALS=2)
    pointers = dict.fromkeys(ALWAYS_INTEGER, "i32") | {"count_ptr": "fp32"}
    made = source(count_kernel, "fp32", fixed, pointers=pointers, integers={})
    yield Variant("count", "power", "bf16", 64, "mask", (config.queries,), (config.keys,), made, {})


def _config(name: configs.Kernel, kind: str, itemsize: int, head_dim: int, device: Device, wide: bool):
    sizes = dict(queries=TOKENS, keys=TOKENS, head_dim=head_dim, itemsize=itemsize)
    return configs.choose(name, kind, **sizes, device=device, wide=wide)


def _variant(
    name: configs.Kernel, grid: str, kind: str, options: dict, sweep: str, dtype, head_dim: int, flags: str,
    device: Device, precision: str,
) -> Variant:  # fmt: skip
    kernel, wide, masked, cope = KERNELS[name], "wide" in flags, "mask" in flags, kind == "cope"
    config = _config(name, kind, dtype.itemsize, head_dim, device, wide)
    positions = POSITIONS if cope else 0
    fixed = {"GROUP": 1} | formula(kind, **options, positions=positions, intervals=2 if masked else 0)
    fixed |= constants(config, head_dim, head_dim, precision)
    fixed |= {"PASS": sweep} if sweep else {}
    fixed |= {"BINS": block_d(positions)} if name == "query" else {}
    launch = {option: fixed.pop(option) for option in ("num_warps", "num_stages")}
    missing = {"r_ptr": kind != "parallax", "dr_ptr": kind != "parallax", "count_ptr": not fixed["COUNTED"]}
    missing |= dict.fromkeys(("known_ptr", "later_ptr", "dknown_ptr"), not cope)
    missing |= dict.fromkeys(ALWAYS_INTEGER, not masked)
    fixed |= {argument: None for argument, without in missing.items() if without and argument in kernel.arg_names}  # pyright: ignore[reportAttributeAccessIssue]
    pointers = dict.fromkeys((*ALWAYS_FLOAT, "count_ptr"), "fp32") | dict.fromkeys(ALWAYS_INTEGER, "i32")
    if cope:
        pointers["dq_ptr"] = "fp32"
    integers: dict = {"mask_strides": (16, 16, 0, 0, 16, 16) if masked else (0,) * 6}
    for argument in kernel.arg_names:  # pyright: ignore[reportAttributeAccessIssue]
        if argument.endswith("_inner"):
            integers[argument] = (0, 0) if wide else (1, 1)
        elif argument.endswith("_strides") and argument != "mask_strides":
            integers[argument] = (16,) * 5 + (1,)
    if kind != "parallax":
        integers |= {"r_strides": (0,) * 6, "r_inner": (1, 1)}
    made = source(kernel, TYPES[dtype], fixed, pointers=pointers, integers=integers, floats=NUMBERS)  # pyright: ignore[reportArgumentType]
    tiles = (config.queries,), (config.keys,)
    return Variant(name, grid, TYPES[dtype], head_dim, flags, *tiles, made, launch)
