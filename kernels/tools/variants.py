"""Variants of kernels for ahead-of-time compilation, and their arguments as calls give them.

Triton makes other machine code where it knows that an integer is 1 or divisible by 16, so a variant says which are.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from triton import JITFunction
from triton.compiler import ASTSource

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
NARROW_DIMS = (40, 72)  # half-precision rows of whole 16 bytes, but not of 16 numbers
PART_DIMS = (40, 72, 80, 96, 160)  # of which kernels hold vectors in two parts
EXTRA_TOKENS = 512  # additional keys
DIVISIBLE = [["tt.divisibility", 16]]


def row_strides(head_dim: int, dtype: str, outer: int) -> tuple[int | None, ...]:
    """Return what is known of strides where rows of `head_dim` numbers follow each other, as `source` takes it.

    `outer` strides, then that of features; in bytes, as `launching.kernel_strides` makes them, where rows fill 16 bytes
    but not 16 numbers.
    """
    if head_dim % 16 == 0:
        return *(16,) * outer, 1
    return (*(0,) * outer, 1) if head_dim * (4 if dtype == "fp32" else 2) % 16 else (*(16,) * outer, 1, None)


class Variant(NamedTuple):
    """A kernel with all that fixes its machine code; `source` and `options` are what `triton.compile` takes.

    `queries` and `keys` are its tiles as the report prints them, empty for a kernel without. `consumers` are the parts
    of a program that multiply, each with warps and hot loops of its own.
    """

    kernel: str
    grid: str
    dtype: str
    head_dim: int
    flags: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    source: ASTSource
    options: dict
    consumers: int = 1


def source(
    kernel: JITFunction,
    dtype: str,
    fixed: Mapping[str, object],
    *,
    pointers: Mapping[str, str],
    integers: Mapping[str, int | tuple[int | None, ...]],
    floats: Collection[str] = ("scale",),
) -> ASTSource:
    """A kernel with its arguments: 32-bit integers, float32 numbers, and pointers `…_ptr` aligned to 16 bytes.

    Args:
        kernel: a function of `triton.jit`.
        dtype: what pointers point to, in Triton's names.
        fixed: values of the compile-time arguments.
        pointers: other types, by argument.
        integers: what is known, by argument: 1 if it is 1, 16 if it is divisible by 16, 0 if nothing; a tuple for an
            argument that is one, with None where that is None. Nothing for those left out.
        floats: arguments that are float32 numbers.
    """
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        known = integers.get(name, 0)
        if name in fixed:
            signature[name], values[name] = "constexpr", fixed[name]
        elif name.endswith("_ptr"):
            signature[name] = "*" + pointers.get(name, dtype)
            attributes[(i,)] = DIVISIBLE
        elif isinstance(known, tuple):
            signature[name] = tuple("constexpr" if k in (1, None) else "i32" for k in known)
            values.update({(i, j): k for j, k in enumerate(known) if k in (1, None)})
            attributes.update({(i, j): DIVISIBLE for j, k in enumerate(known) if k == 16})
        elif known == 1:
            signature[name], values[name] = "constexpr", 1
        else:
            signature[name] = "fp32" if name in floats else "i32"
    kind = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as kind
    return kind(kernel, signature, values, attributes)
