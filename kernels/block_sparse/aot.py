"""Ahead-of-time compilation of the block-sparse kernels: every kernel, dtype and pinned size, without a device."""

from collections.abc import Iterator
from itertools import product
from math import prod

import torch
from triton.compiler import ASTSource

from ..common.launching import Device
from ..neighborhood.configs import SIZES as NEIGHBORHOOD_SIZES
from ..neighborhood.configs import extra_block
from ..tools.variants import EXTRA_TOKENS, PART_DIMS, TYPES, Variant, row_strides, source
from . import configs, gluon
from .backward import key_kernel, query_kernel
from .forward import forward_kernel
from .gluon_forward import forward_kernel as gluon_kernel
from .launch import constants

BOXES = {  # axes of the grid, and a block of queries and of keys
    "8x8": (2, (8, 8), (8, 8)),  # tiles that lie in one block
    "4x4": (2, (4, 4), (4, 4)),  # several blocks of keys a tile
    "22x18": (2, (22, 18), (22, 18)),  # tiles that cross blocks
    "4x4x4": (3, (4, 4, 4), (4, 4, 4)),
    "4x4x8": (3, (4, 4, 8), (4, 4, 8)),  # as many tokens as the longest tiles
}
# wide: 64-bit offsets; grouped: two query heads a key head; values: of VALUE_DIM features a head
# skip: with `skip_threshold`
FLAGS = ("", "bias, extra, lengths", "wide, grouped", "ones", "values")
# int8, e4m3: queries and keys of eight bits, which not all matrix units multiply
EIGHT_BITS = {"int8": "i8", "e4m3": "fp8e4nv"}
# of whole blocks. cut: the blocks do not divide the grid; pointers: descriptors cannot address the tensors
WHOLE_FLAGS = ("", "cut, bias, extra", "cut, pointers")
VALUE_DIM = 256
KERNELS = {"forward": forward_kernel, "query": query_kernel, "key": key_kernel}
LISTED = 16  # blocks in a list


SCALES = ("q_scale_ptr", "k_scale_ptr", "extra_scale_ptr")
POINTERS = dict.fromkeys(("lse_ptr", "dlse_ptr", "delta_ptr", "bias_ptr"), "fp32")
POINTERS |= {"extra_mask_ptr": "u8", "kept_ptr": "u8"}
POINTERS |= dict.fromkeys(SCALES, "fp32")
INTEGERS = ("num_ptr", "idx_ptr", "starts_ptr", "order_ptr", "q_len_ptr", "kv_len_ptr", "extra_ends_ptr")
POINTERS |= dict.fromkeys(INTEGERS, "i32")


def _source(
    kernel, dtype: str, head_dim: int, rank: int, fixed: dict, ones: bool, rounded: str | None = None
) -> ASTSource:
    """Arguments as a contiguous call gives them; with `ones`, there is one batch and one head. Queries and keys are
    `rounded` to a type of eight bits."""
    integers: dict = {"lists": (1,) * 5, "heads": 1, "key_heads": 1} if ones else {"lists": (0,) * 5}
    for name in kernel.arg_names:
        if name.endswith("_strides"):
            rows = row_strides(head_dim, dtype, 3 if name.startswith("extra") else 5)
            integers[name] = (0,) * 4 + (1,) if "lse" in name else rows
        elif name.endswith("_lengths"):
            integers[name] = (1,) * (3 - rank) + (0,) * rank
    pointers = POINTERS if rounded is None else POINTERS | dict.fromkeys(("q_ptr", "k_ptr", "extra_k_ptr"), rounded)
    return source(kernel, dtype, fixed, pointers=pointers, integers=integers, floats=("scale", "threshold"))


def variants(*, device: Device, tf32: bool, descriptors: bool) -> Iterator[Variant]:
    """Every kernel with every pinned size on every kind of block, and with all options at head dim 64.

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
                    for grid in BOXES if head_dim == 64 else ("8x8", "22x18", "4x4x8"):
                        yield from _variants(kernel, grid, dtype, head_dim, device, precision, descriptors)
                for head_dim in sorted(set(PART_DIMS) - set(table)) if itemsize == 2 else ():
                    for grid in ("22x18", "4x4x8"):
                        yield from _variants(kernel, grid, dtype, head_dim, device, precision, descriptors)


def _flags(
    kernel: configs.Kernel, grid: str, head_dim: int, dtype: torch.dtype, device: Device, descriptors: bool
) -> tuple[str, ...]:
    """Flags of the variants of one kind of block."""
    common = FLAGS if head_dim == 64 and grid in ("8x8", "22x18") else FLAGS[:2]
    if grid not in ("8x8", "4x4x8") or head_dim > 128 or dtype.itemsize > 2:
        return common
    room = head_dim * dtype.itemsize * prod(BOXES[grid][2]) <= configs.skip_bytes(device)
    common += ("skip",) * (kernel == "forward" and room)
    if kernel == "forward":
        common += tuple(word for word in EIGHT_BITS if _multiplies(word, device))
    whole = WHOLE_FLAGS if descriptors else WHOLE_FLAGS[:-1]
    return (*whole, *common[2:]) if grid == "4x4x8" else (*common, *whole[1:])


def _multiplies(word: str, device: Device) -> bool:
    """Whether matrix units of a device multiply numbers of eight bits; those of AMD know another e4m3."""
    return (device, "forward", 1) in NEIGHBORHOOD_SIZES if word == "e4m3" else device != "rdna"


def gluon_variants() -> Iterator[Variant]:
    """The Gluon forward of sm_90, with blocks of keys of one tile and of a half, that divide the grid and do not."""
    half = [dtype for dtype in TYPES if dtype.itemsize == 2]
    rank, box, _ = BOXES["4x4x8"]
    for dtype, head_dim, (grid, keys) in product(half, configs.GLUON_SIZES, {"4x4x8": box, "4x4x4": (4, 4, 4)}.items()):
        parts = gluon.configure(box, keys, head_dim)
        for flags in ("", "cut", "wide, grouped"):
            facts = dict(wide="wide" in flags, even=flags != "cut")
            fixed = dict(gluon.constants(parts, box, keys, head_dim, **facts), GROUP=1 + ("grouped" in flags))
            options = dict(num_warps=fixed.pop("num_warps"), num_stages=parts.stages)
            made = _source(gluon_kernel, TYPES[dtype], head_dim, rank, fixed, ones=False)
            tiles = (2 * prod(parts.share),), (prod(parts.tile),)
            known = ("gluon", grid, TYPES[dtype], head_dim, flags)
            yield Variant(*known, *tiles, made, options, gluon.CONSUMERS.value)


def _variants(
    kernel: configs.Kernel, grid: str, dtype, head_dim: int, device: Device, precision: str, descriptors: bool
) -> Iterator[Variant]:
    rank, query_box, key_box = BOXES[grid]
    own, other = (key_box, query_box) if kernel == "key" else (query_box, key_box)
    for flags in _flags(kernel, grid, head_dim, dtype, device, descriptors):
        bias, extra, lengths = ("bias" in flags, "extra" in flags, "lengths" in flags)
        wide, ones = "wide" in flags, "ones" in flags
        widths = head_dim, VALUE_DIM if "values" in flags else head_dim
        sizes = dict(head_dim=max(widths), itemsize=dtype.itemsize, device=device)
        possible = dict(whole=not lengths, descriptor=descriptors and "pointers" not in flags)
        if "skip" in flags:
            config = configs.skipping(own, other, wide=wide, **possible)
        else:
            config = configs.choose(kernel, own, other, LISTED, **sizes, wide=wide, **possible)
        held = configs.held(*widths, kernel, device, eight_bits=flags in EIGHT_BITS)
        fixed = constants(config, query_box, key_box, held, precision, even="cut" not in flags)
        fixed |= dict(GROUP=1 + wide, BIAS=bias, Q_LEN=lengths, KV_LEN=lengths)
        options = {name: fixed.pop(name) for name in ("num_warps", "num_stages")}
        if kernel == "forward":
            fixed |= dict(SKIP="skip" in flags, SCALED=flags in EIGHT_BITS)
            fixed |= dict.fromkeys(SCALES[2:] if fixed["SCALED"] else SCALES)
        if kernel != "key":
            fixed |= dict(EXTRA=extra or ones, EXTRA_MASK=extra)
            fixed |= dict(EXTRA_KEYS=extra_block(EXTRA_TOKENS, max(widths), dtype.itemsize, device))
            if not extra:
                fixed |= dict(extra_mask_ptr=None, extra_ends_ptr=None)
        if widths[0] == widths[1]:
            fixed |= {"query": dict(dq_strides=None), "key": dict(dv_strides=None)}.get(kernel, {})
        if not bias:
            fixed |= dict(bias_ptr=None)
        if not lengths:
            fixed |= dict(q_len_ptr=None, kv_len_ptr=None)
        rounded = EIGHT_BITS.get(flags)
        made = _source(KERNELS[kernel], TYPES[dtype], head_dim, rank, fixed, ones, rounded)
        yield Variant(kernel, grid, TYPES[dtype], head_dim, flags, config.queries, config.keys, made, options)
