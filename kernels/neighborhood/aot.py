"""Ahead-of-time compilation of the neighborhood kernels: every kernel, dtype and pinned size, without a device."""

from collections.abc import Iterator
from itertools import product

import torch
from triton.compiler import ASTSource

from ..common.launching import Device, vectors
from ..tools.variants import EXTRA_TOKENS, PART_DIMS, TYPES, Variant, row_strides, source
from . import configs, gluon
from .backward import extra_kernel, key_kernel, query_kernel, table_kernel
from .forward import forward_kernel
from .geometry import Axis
from .gluon_forward import forward_kernel as gluon_kernel
from .launch import constants, extra_constants, table_constants

GRIDS = {
    "7x7": (Axis(56, 7), Axis(56, 7)),  # small windows: few tiles, all masked
    "21x21": (Axis(64, 21), Axis(64, 21)),
    "18x24x24": (Axis(30, 18), Axis(48, 24), Axis(80, 24)),  # large windows: wholly visible tiles, then masked ones
}
# wide: 64-bit offsets; grouped: two query heads a key head; part: queries that are a box of the grid
FLAGS = ("", "bias, extra", "wide, grouped", "ones", "part")
NARROW_KEYS = "keys of 64"  # features a head, beside values of head_dim
E4M3_FLAGS = ("e4m3", "e4m3, bias, extra", "e4m3, wide, grouped", "e4m3, ones")
KERNELS = {"forward": forward_kernel, "query": query_kernel, "key": key_kernel}


FLOATS = {"lse_ptr", "dlse_ptr", "delta_ptr", "partial_ptr", "pairs_ptr", "bias_ptr", "factor_ptr"}
E4M3 = {"q_ptr", "k_ptr", "extra_k_ptr"}
MASK = {"extra_mask_ptr": "u8", "extra_ends_ptr": "i32"}


def _source(kernel, dtype: str, head_dim: int, rank: int, fixed: dict, ones: bool = False) -> ASTSource:
    """Arguments as a contiguous call gives them; with `ones`, there is one batch and one head."""
    floats = FLOATS | {"dk_ptr", "dv_ptr"} if kernel is extra_kernel else FLOATS
    eights = E4M3 if fixed.get("QUANTIZED") else ()
    integers: dict = dict.fromkeys(("batches", "heads", "key_heads"), 1) if ones else {}
    integers |= {"lengths": (1,) * (3 - rank) + (0,) * rank, "start": (0,) * 3, "counts": (0,) * 3}
    for name in kernel.arg_names:
        if name.endswith("_strides"):
            integers[name] = row_strides(head_dim, dtype, 3 if name.startswith("extra") else 5)
    pointers = dict.fromkeys(floats, "fp32") | dict.fromkeys(eights, "fp8e4nv") | MASK
    return source(kernel, dtype, fixed, pointers=pointers, integers=integers)


def variants(*, device: Device, tf32: bool, descriptors: bool) -> Iterator[Variant]:
    """Every kernel with every size of the pinned table on every grid, and with bias and extra keys on the 2-D one;
    with the first size for head dims in two parts, too.

    Args:
        device: which table of sizes.
        tf32: whether matrix units take float32 as TF32 only, see `launching.precision`.
        descriptors: whether the device has tensor descriptors.
    """
    for dtype in TYPES:
        precision = "tf32x3" if tf32 and dtype == torch.float32 else "ieee"
        for (table_device, kernel, itemsize), table in configs.SIZES.items():
            if (table_device, itemsize) == (device, dtype.itemsize):
                for head_dim, sizes in table.items():
                    for size in sizes:
                        known = (dtype, head_dim, size, device, descriptors, precision)
                        for grid in GRIDS:
                            flags = FLAGS[: 4 - len(GRIDS[grid])]
                            if head_dim == 64 and grid == "21x21":
                                masks = size == sizes[0] and kernel != "key"
                                flags = (*FLAGS, "masked extra") if masks else FLAGS
                            yield from _window_variants(kernel, grid, *known, flags)
                        if head_dim == 256:
                            yield from _window_variants(kernel, "21x21", *known, (NARROW_KEYS,))
                for head_dim in sorted(set(PART_DIMS) - set(table)) if itemsize == 2 else ():
                    size = configs.sizes_of(kernel, head_dim, itemsize, device)[0]
                    known = (dtype, head_dim, size, device, descriptors, precision)
                    yield from _window_variants(kernel, "18x24x24", *known, ("",))
        if tf32 and dtype.itemsize == 2:  # the matrix units of gfx942 know another e4m3
            yield from _e4m3_variants(dtype, device, descriptors)
        for head_dim in (64, 128, 256):
            yield from _token_variants(dtype, head_dim, device, precision)


def _e4m3_variants(dtype, device: Device, descriptors: bool) -> Iterator[Variant]:
    """The forward with queries and keys in e4m3, on the grid with large windows."""
    for head_dim, sizes in configs.SIZES.get((device, "forward", 1), {}).items():
        flags = E4M3_FLAGS if head_dim == 64 else E4M3_FLAGS[:1]
        for size in sizes:
            known = (dtype, head_dim, size, device, descriptors, "ieee")
            yield from _window_variants("forward", "18x24x24", *known, flags)


def _window_variants(
    kernel,
    grid: str,
    dtype,
    head_dim: int,
    size,
    device: Device,
    descriptors: bool,
    precision: str,
    all_flags: tuple[str, ...],
) -> Iterator[Variant]:
    axes = GRIDS[grid]
    for flags in all_flags:
        full, wide, ones, e4m3, masked = (word in flags for word in ("bias", "wide", "ones", "e4m3", "masked"))
        pairs = full and kernel == "query" and size.queries <= configs.PAIR_ROWS
        widths = (64 if flags == NARROW_KEYS else head_dim, head_dim)
        with configs.override(size=size):
            config = configs.choose(
                kernel,
                axes,
                head_dim=head_dim,
                itemsize=1 if e4m3 else dtype.itemsize,
                device=device,
                descriptor=descriptors,
                wide=wide,
            )
        held = configs.held(*widths, kernel, device, eight_bits=e4m3)
        fixed = dict(constants(axes, config, held, precision), BIAS=full, GROUP=1 + wide)
        fixed["PART"] = "part" in flags
        options = {name: fixed.pop(name) for name in ("num_warps", "num_stages")}
        if kernel != "key":
            fixed |= dict(EXTRA=full or ones or masked, EXTRA_MASK=masked)
            fixed |= dict(EXTRA_KEYS=configs.extra_block(EXTRA_TOKENS, max(widths), dtype.itemsize, device))
            if not masked:
                fixed |= dict.fromkeys(MASK)
        if kernel == "forward":
            fixed |= dict(QUANTIZED=e4m3) if e4m3 else dict(QUANTIZED=False, factor_ptr=None)
        if kernel == "query":
            fixed |= dict(DBIAS=True) if pairs else dict(DBIAS=False, pairs_ptr=None)
        if not full:
            fixed["bias_ptr"] = None
        if widths[0] == widths[1]:
            fixed |= {"query": dict(dq_strides=None), "key": dict(dv_strides=None)}.get(kernel, {})
        if not fixed["PART"]:
            fixed |= dict(start=None, counts=None)
        made = _source(KERNELS[kernel], TYPES[dtype], head_dim, len(axes), fixed, ones)
        yield Variant(kernel, grid, TYPES[dtype], head_dim, flags, config.queries, config.keys, made, options)
        if pairs:
            fixed = dict(table_constants(axes, config.queries), start=None, counts=None)
            options = {"num_warps": fixed.pop("num_warps")}
            made = _source(table_kernel, TYPES[dtype], head_dim, len(axes), fixed)
            yield Variant("table", grid, TYPES[dtype], head_dim, flags, config.queries, (), made, options)


def gluon_variants() -> Iterator[Variant]:
    """The Gluon forward of sm_90 with every size, and the first size with the flags that it has."""
    half = [dtype for dtype in TYPES if dtype.itemsize == 2]
    for dtype, (head_dim, sizes) in product(half, configs.GLUON_SIZES.items()):
        for size, (grid, axes) in product(sizes, GRIDS.items()):
            several = size == sizes[0] and grid == "21x21"
            for flags in ("", "wide, grouped", "ones", "part") if several else ("",):
                with configs.override(size=size):
                    config = gluon.configure(axes, head_dim, wide="wide" in flags)
                fixed = dict(gluon.constants(axes, config, head_dim), GROUP=1 + ("grouped" in flags))
                fixed["PART"] = flags == "part"
                options = dict(num_warps=fixed.pop("num_warps"), num_stages=config.stages)
                fixed |= {} if fixed["PART"] else dict(start=None, counts=None)
                made = _source(gluon_kernel, TYPES[dtype], head_dim, len(axes), fixed, flags == "ones")
                known = ("gluon", grid, TYPES[dtype], head_dim, flags)
                yield Variant(*known, config.queries, config.keys, made, options, gluon.CONSUMERS.value)


def _token_variants(dtype, head_dim: int, device: Device, precision: str) -> Iterator[Variant]:
    """The kernel that walks all tokens."""
    axes = GRIDS["7x7"]
    for flags in ("extra", "extra, ones", "masked extra", "few extra"):
        masked, extra = "masked" in flags, 1 if "few" in flags else EXTRA_TOKENS
        size = configs.extra_gradient_size(extra, head_dim, dtype.itemsize, device)
        held = vectors(head_dim, head_dim, device)
        fixed = dict(extra_constants(size, held, precision), GROUP=1)
        options = {"num_warps": fixed.pop("num_warps")}
        more = dict(EXTRA_MASK=True) if masked else dict(EXTRA_MASK=False, **dict.fromkeys(MASK))
        made = _source(extra_kernel, TYPES[dtype], head_dim, len(axes), fixed | more, "ones" in flags)
        yield Variant("extra", "7x7", TYPES[dtype], head_dim, flags, (), (), made, options)
