"""Matrix products that a compiled kernel does more than once, and accesses of spilled registers in its loops.

A tile of a product is shared out to warps by a layout, of so many warps and of instructions of such a shape along rows
and columns. Where together they reach past the tile, warps hold the same rows or columns and each does their products:
eight warps along 64 rows, with instructions of 16 rows, do all of it twice. Triton's own code for the device states the
layout of every product, whatever the device; loops may still be unrolled behind it, so counts of machine code
(`sass.Loop.products`) agree only where none is.
"""

import re
from math import prod

from . import sass

LAYOUT = re.compile(r"^#(\w+) = #ttg\.(nvidia_mma|amd_mfma|amd_wmma)<\{(.*)\}>")
PRODUCT = re.compile(
    r"= (?:tt\.dot|ttng\.warp_group_dot) .*?(?:tensor|memdesc)<\d+x(\d+)x.*-> tensor<(\d+)x(\d+)x\w+, #(\w+)>"
)
WMMA = (16, 16)  # rows and columns of an instruction, which their layout does not state


def _numbers(text: str, name: str) -> list[int]:
    found = re.search(rf"{name} = \[([\d, ]*)\]", text)
    return [int(x) for x in found[1].split(",")] if found else []


def _reach(kind: str, text: str) -> tuple[int, int]:
    """Rows and columns that the warps of a layout reach, one instruction each."""
    warps, shape = _numbers(text, "warpsPerCTA"), _numbers(text, "instrShape")[:2] or list(WMMA)
    if not warps:  # powers of two along either side
        bases = re.search(r"warp = \[(?:\[\d+, \d+\](?:, )?)*\]", text)
        vectors = re.findall(r"\[(\d+), (\d+)\]", bases[0] if bases else "")
        warps = [2 ** sum(int(vector[side]) > 0 for vector in vectors) for side in (0, 1)]
    if len(warps) != 2 or len(shape) != 2:
        raise ValueError(f"a layout of {kind} without its warps: {text}")
    return warps[0] * shape[0], warps[1] * shape[1]


def repetition(ttgir: str) -> float:
    """Multiply-adds done over those needed, 1 at best: the most of any hot loop, or of code without one; 0 without any.

    A hot loop is an innermost one with a product. Products of sm_100 are done by one thread and never twice.

    Args:
        ttgir: Triton's code for the device, `asm["ttgir"]` of a compiled kernel.
    """
    layouts = {m[1]: _reach(m[2], m[3]) for line in ttgir.splitlines() if (m := LAYOUT.match(line))}
    depth, inside = 0, []  # the loops around a line: how deep each begins, and its number
    counts: list[list[int]] = [[0, 0]]  # of the code outside of loops, then of every loop: needed, done
    for line in ttgir.splitlines():
        if "ttng.tc_gen5_mma " in line:
            shape = re.findall(r"memdesc<(\d+)x(\d+)x", line)
            needed = done = int(shape[0][0]) * int(shape[0][1]) * int(shape[1][1])
        elif (found := PRODUCT.search(line)) and found[4] in layouts:
            columns, rows, needed = int(found[3]), int(found[2]), prod([int(found[i]) for i in (1, 2, 3)])
            reach = layouts[found[4]]
            done = needed * max(1, reach[0] // rows) * max(1, reach[1] // columns)
        else:
            needed = done = 0
        counts[inside[-1][1] if inside else 0][0] += needed
        counts[inside[-1][1] if inside else 0][1] += done
        if re.search(r"\bscf\.(for|while)\b", line):
            inside.append((depth, len(counts)))
            counts.append([0, 0])
        depth += line.count("{") - line.count("}")
        while inside and depth <= inside[-1][0] and "scf." not in line:
            inside.pop()
    loops = [done / needed for needed, done in counts[1:] if needed]
    return max(loops or [done / needed for needed, done in counts[:1] if needed], default=0.0)


def spilled_inside(code: dict, arch: str, warps: int) -> int:
    """Instructions in the hot loops of a compiled kernel that load or store spilled registers.

    Args:
        code: `asm` of a compiled kernel.
        arch: its architecture.
        warps: of a program.
    """
    if not arch.startswith("gfx"):
        loops = sass.hot_loops(sass.disassemble(code["cubin"]), arch, warps)
        return int(sum(loop.spilled for loop in loops))
    lines = code["amdgcn"].splitlines()
    lines = lines[: max((i for i, line in enumerate(lines) if "s_endpgm" in line), default=len(lines))]
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:", line)}
    targets = [(i, re.search(r"\bs_c?branch\w* (\.LBB\w+)", line)) for i, line in enumerate(lines)]
    jumps = [(labels.get(target[1], i), i) for i, target in targets if target]
    matrices = [i for i, line in enumerate(lines) if re.match(r"\s+v_s?w?mf?mac?_", line)]
    loops = sass.innermost([(b, e) for b, e in jumps if b < e], matrices)
    return sum("scratch_" in line for b, e in loops for line in lines[b : e + 1])
