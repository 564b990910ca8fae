"""Multiply-adds that a kernel needs, by its source, and does, by its machine code.

The source is Triton's own intermediate code, before warps share the work: every `tt.dot` once. Where warps hold the
same rows or columns, each of them does the product.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

from . import sass

DOT = re.compile(r"tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x(\w+)>")
TIMES = {"tf32x3": 3, "bf16x3": 3, "bf16x6": 6}  # products of a float32 product in parts


class Products(NamedTuple):
    """Multiply-adds of one iteration of every hot loop, and of the whole code, each instruction once."""

    loops: tuple[int, ...]
    once: int


class Counted(NamedTuple):
    """What machine code does: its products, and accesses of spilled registers inside of hot loops."""

    products: Products
    spilled: int


def _dot(line: str, fma: bool) -> int:
    shape = DOT.search(line)
    if shape is None:
        raise ValueError(f"a product of unknown shape: {line.strip()}")
    rows, depth, columns, dtype = int(shape[1]), int(shape[2]), int(shape[3]), shape[4]
    precision = re.search(r"inputPrecision = (\w+)", line)
    if fma and dtype == "f32" and precision is None:  # IEEE products take no matrix unit
        return 0
    return rows * columns * depth * TIMES.get(precision[1] if precision else "", 1)


def needed(ttir: str, *, fma: bool) -> Products:
    """Products of a kernel in Triton's intermediate code; a hot loop is an innermost one with a product.

    Args:
        fma: whether float32 products without TF32 are no matrix instructions, as on NVIDIA's devices.
    """
    depth, open_loops, loops, once = 0, [], [], 0
    for line in ttir.splitlines():
        if "tt.dot" in line:
            products = _dot(line, fma)
            once += products
            if open_loops and products:
                loop = loops[open_loops[-1][1]]
                loop[1] += products
        elif re.search(r"\bscf\.(for|while)\b", line):
            for _, outer in open_loops:
                loops[outer][0] = False
            open_loops.append((depth, len(loops)))
            loops.append([True, 0])
        depth += line.count("{") - line.count("}")
        while open_loops and depth <= open_loops[-1][0] and "scf." not in line:
            open_loops.pop()
    return Products(tuple(count for innermost, count in loops if innermost and count), once)


def _instructions(lines: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Lines with matrix instructions of AMD's devices, and the multiply-adds of a wave in each."""
    for i, line in enumerate(lines):
        if shape := re.match(r"\s+v_(?:s?mfmac?|s?wmmac?)_[a-z0-9]+?_(\d+)x(\d+)x(\d+)", line):
            yield i, int(shape[1]) * int(shape[2]) * int(shape[3])


def _amd(assembly: str, warps: int) -> Counted:
    lines = assembly.splitlines()
    lines = lines[: max((i for i, line in enumerate(lines) if "s_endpgm" in line), default=len(lines))]
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:", line)}
    jumps = [
        (labels.get(m[1], i), i)
        for i, line in enumerate(lines)
        if (m := re.search(r"\bs_c?branch\w* (\.LBB\w+)", line))
    ]
    products = list(_instructions(lines))
    loops = sass.innermost(((b, e) for b, e in jumps if b < e), [i for i, _ in products])
    counts = tuple(sum(n for i, n in products if b <= i <= e) * warps for b, e in loops)
    spilled = sum("scratch_" in line for b, e in loops for line in lines[b : e + 1])
    return Counted(Products(counts, sum(n for _, n in products) * warps), spilled)


def done(code: dict, arch: str, warps: int) -> Counted:
    """Products of a compiled kernel, `code` being what `triton.compile` keeps in `asm`."""
    if arch.startswith("gfx"):
        return _amd(code["amdgcn"], warps)
    text = sass.disassemble(code["cubin"])
    loops = tuple(sass.hot_loops(text, arch, warps))
    whole = sass.whole(text, arch, warps)
    return Counted(Products(tuple(loop.products for loop in loops), whole), int(sum(loop.spilled for loop in loops)))


def ratio(need: Products, did: Products) -> float:
    """Largest share of multiply-adds done over those needed: of hot loops, or of the code where there is none.

    The compiler may order loops as it likes: loops of fewer products are compared with those of fewer.
    """
    if not need.loops:
        return did.once / need.once if need.once else 0.0
    pairs = zip_longest(sorted(did.loops), sorted(need.loops)[-len(did.loops) :], fillvalue=max(need.loops))
    return max((a / b for a, b in pairs), default=0.0)
