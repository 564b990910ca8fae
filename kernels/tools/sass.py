"""Cost of one iteration of a kernel's hot loops for a scheduler, counted in NVIDIA machine code.

A hot loop is an innermost one with matrix instructions. Counts are of throughput, not of latency: with T the clocks of
the matrix unit and B those of the busiest other unit (exponentials, float32, integers and comparisons, or the issue of
instructions, one a clock), P programs on an SM take at least max(T, B, (T + B) / P) a turn each: inside one program
products and softmax wait for each other, so nothing but other programs can fill the gaps.

Rates are of NVIDIA's tuning guides and of the table of arithmetic instructions in the CUDA programming guide. Copies,
caches and barriers are not in the bound.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

SCHEDULERS = 4  # of an SM; each has a quarter of its units


class Device(NamedTuple):
    """An SM: multiply-adds of half precision a clock, threads, bytes of shared memory, and float32 lanes."""

    products: int
    threads: int
    shared: int
    lanes: int


DEVICES = {
    "sm_80": Device(1024, 2048, 164 * 1024, 64),
    "sm_86": Device(512, 1536, 100 * 1024, 128),
    "sm_89": Device(512, 1536, 100 * 1024, 128),
    "sm_90": Device(2048, 2048, 228 * 1024, 128),
    "sm_100": Device(4096, 2048, 228 * 1024, 128),
    "sm_120": Device(512, 1536, 100 * 1024, 128),
}
REGISTERS = 65536
RESERVED = 1024  # bytes of shared memory that the system takes of every program
TENSOR_COLUMNS = 512  # of the tensor memory of sm_100
QUARTER_RATE = 8  # clocks of a scheduler's unit with 4 lanes for the 32 threads of a warp
HALF_RATE = 2  # with 16 lanes

UNITS = (  # the first that matches names the unit; the rest issue, and no more
    ("matrix", r"HGMMA|QGMMA|HMMA|QMMA|UTC\w*MMA"),
    ("special", r"MUFU|I2F|F2I|F2F\b"),
    ("float32", r"FFMA|FMUL|FADD"),
    ("integer", r"FMNMX|FSEL|FSET|F2FP|ISETP|IADD|VIADD|VIMNMX|IMNMX|LOP3|SHF|SEL|PRMT|LEA|IABS|PLOP3|P2R|R2P|IMAD"),
    ("memory", r"LD|ST|UTMA|ATOM|SHFL"),
)


class Loop(NamedTuple):
    """One iteration of a loop on one scheduler.

    Attributes:
        matrix: matrix instructions.
        products: multiply-adds that these do on the whole SM.
        tensor: clocks of the matrix unit.
        special, float32, integer, memory: instructions by unit; integer holds comparisons, selections and minima, too,
            memory the shuffles.
        issue: all instructions.
        spilled: loads and stores of registers that were spilled.
    """

    matrix: float
    products: int
    tensor: float
    special: float
    float32: float
    integer: float
    memory: float
    issue: float
    spilled: float = 0

    def busy(self, arch: str) -> float:
        """Clocks of the busiest unit but that of matrices."""
        float32 = self.float32 * 32 * SCHEDULERS / DEVICES[arch].lanes
        return max(QUARTER_RATE * self.special, float32, HALF_RATE * self.integer, self.issue)

    def share(self, arch: str, programs: int) -> float:
        """Most that `programs` on an SM can reach of the peak of its matrix units, at most 1."""
        busy = self.busy(arch)
        return self.tensor / max(self.tensor, busy, (self.tensor + busy) / programs)


def resident_programs(arch: str, *, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> int:
    """Programs that an SM holds at a time, at least 1."""
    device = DEVICES[arch]
    limits = [
        REGISTERS // (-(-registers // 8) * 8 * 32 * warps),
        device.shared // (shared + RESERVED),
        device.threads // (32 * warps),
    ]
    if tensor_columns:
        limits.append(TENSOR_COLUMNS // tensor_columns)
    return max(1, min(limits))


def disassemble(cubin: bytes) -> str:
    """Machine code as text, with labels."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "kernel.cubin"
        code.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(code)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def hot_loops(sass: str, arch: str, warps: int) -> Iterator[Loop]:
    """The hot loops of a kernel of `warps` warps, in the order of its code."""
    lines = sass[: sass.rfind("EXIT")].splitlines()  # what waits for barriers comes after and jumps back
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if re.fullmatch(r"\.L\w+:", line)}
    jumps = ((labels.get(target, i), i) for i, target in _jumps(lines))
    matrices = [i for i, line in enumerate(lines) if _unit(line) == "matrix"]
    for begin, end in innermost(((b, e) for b, e in jumps if b < e), matrices):
        yield _count(lines, begin, end, arch, warps)


def innermost(jumps: Iterable[tuple[int, int]], matrices: Sequence[int]) -> list[tuple[int, int]]:
    """Loops with a matrix instruction and none such inside, as first and last line, from jumps back."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(jumps):
        if any(begin <= i < end for i in matrices):
            found = [(b, e) for b, e in found if not (b <= begin and end <= e)] + [(begin, end)]
    return found


def _jumps(lines: list[str]) -> Iterator[tuple[int, str]]:
    for i, line in enumerate(lines):
        if match := re.search(r"BRA(?:\.\w+)* (?:!?\w+, )?`\((\.L\w+)\)", line):
            yield i, match[1]


def _opcode(line: str) -> str | None:
    match = re.match(r"\s+/\*\w+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z]\w*(?:\.\w+)*)", line)
    return match[1] if match else None


def _unit(line: str) -> str | None:
    """The unit that executes an instruction, "other" for one that only issues, None where there is no instruction."""
    opcode = _opcode(line)
    return opcode and next((name for name, pattern in UNITS if re.match(pattern, opcode)), "other")


def _shape(lines: list[str], i: int) -> tuple[int, int, int]:
    """Rows, columns and depth of the product that matrix instruction `i` does for its warp, or for its program."""
    opcode = _opcode(lines[i]) or ""
    if group := re.search(r"GMMA\.64x(\d+)x(\d+)", opcode):  # four warps together
        return 16, int(group[1]), int(group[2])
    if warp := re.search(r"MMA\.(16)(8)(\d+)", opcode):
        return int(warp[1]), int(warp[2]), int(warp[3])
    register = re.findall(r"idesc\[(UR\d+)\]", lines[i])[0]  # one thread for all warps; the shape is a constant before
    values = (re.search(rf"UMOV {register}, (0x\w+)", line) for line in reversed(lines[:i]))
    descriptor = next(int(value[1], 16) for value in values if value)
    return (descriptor >> 24 & 31) << 4, (descriptor >> 17 & 63) << 3, 32 if "QMMA" in opcode else 16


def _count(lines: list[str], begin: int, end: int, arch: str, warps: int) -> Loop:
    units = [(_unit(lines[i]), i) for i in range(begin, end + 1) if _unit(lines[i])]
    counts = {name: sum(unit == name for unit, _ in units) * warps / SCHEDULERS for name, _ in UNITS}
    products = clocks = 0
    for unit, i in units:
        if unit == "matrix":
            m, n, k = _shape(lines, i)
            done = m * n * k * (1 if "UTC" in lines[i] else warps)
            products += done
            eight_bits, tf32 = "QGMMA" in lines[i] or "QMMA" in lines[i], "TF32" in lines[i]
            clocks += done / DEVICES[arch].products / (2 if eight_bits else 0.5 if tf32 else 1)
    local = sum(bool(re.match(r"LDL|STL", _opcode(lines[i]) or "")) for _, i in units)
    return Loop(products=products, tensor=clocks, issue=len(units) * warps / SCHEDULERS, spilled=local, **counts)
