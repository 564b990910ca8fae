"""Compile every kernel without a device: `python -m foveal.kernels.tools.compile_report --arch sm_90`.

One row a kernel variant: registers, spills, shared memory, how often products are done, whether Hopper's matrix
(wgmma) and copy (TMA) instructions are there. Exits with 1 where a variant breaks the rule: it compiles, and wants no
more shared memory than the device has; in half precision it does every product of rows by columns once, spills nothing
inside of hot loops and at most 16 bytes a thread outside. `Row.allowed` says what no table can mend.

With `--loop`, a row for every hot loop instead: the cost of one iteration for a scheduler of an SM, see `sass`.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from random import Random
from typing import NamedTuple

from .. import ops  # noqa: F401 - declares all operators
from ..common.launching import Device
from ..common.operator import OPERATORS as DECLARED
from . import products, sass

OPERATORS = tuple(sorted(name for name, operator in DECLARED.items() if "triton" in operator.modules))
MOST_SPILLED = 16  # bytes a thread, outside of hot loops: to forbid 4 or 8 costs more than they do


class Architecture(NamedTuple):
    """Shared memory a program may have, in bytes, the table of sizes of the device, threads that run in step, and
    whether matrix units multiply e4m3 numbers."""

    shared: int
    device: Device
    descriptors: bool = False
    lanes: int = 32
    e4m3: bool = True


ARCHITECTURES = {
    "sm_80": Architecture(163 * 1024, "ampere"),
    "sm_86": Architecture(99 * 1024, "ada", e4m3=False),
    "sm_89": Architecture(99 * 1024, "ada"),
    "sm_90": Architecture(227 * 1024, "hopper", descriptors=True),
    "sm_100": Architecture(227 * 1024, "hopper", descriptors=True),
    "sm_120": Architecture(99 * 1024, "ada", descriptors=True),
    "gfx942": Architecture(64 * 1024, "amd", lanes=64),
    "gfx950": Architecture(160 * 1024, "amd", lanes=64),
    "gfx1201": Architecture(64 * 1024, "rdna"),
}


@dataclass(frozen=True)
class Head:
    """A variant of a kernel."""

    operator: str
    kernel: str
    grid: str
    dtype: str
    head_dim: int
    flags: str
    queries: str
    keys: str
    warps: int
    stages: int
    arch: str


@dataclass(frozen=True)
class Row(Head):
    """Compiler output of one variant.

    Registers are those of a thread; `spills`, in bytes, too, of which `inside` instructions of hot loops access some.
    `products` is how many multiply-adds are done for each that is needed, 0 without any; `shared` is in bytes.
    """

    registers: int
    spills: int
    inside: int
    shared: int
    products: float
    wgmma: bool
    tma: bool
    error: str = ""

    @property
    def allowed(self) -> float:
        """Products done for each that is needed, where no size of tile does them once."""
        if self.head_dim < 32:
            return 1.67  # four warps side by side need 32 columns, in some product of the backward the head dim
        if self.kernel == "key" and self.head_dim > 128:
            return 1.5  # of few agents: four warps on 32 rows of both gradients, for their registers
        if self.kernel == "extra" and self.arch.startswith("gfx"):
            return 2.5  # 16 keys feed one wave, 64 two or three; the others hide the loads of queries
        if self.kernel == "extra" and self.head_dim > 128:
            return 1.5  # logits of 32 keys by 16 queries feed two warps; four hold both gradients
        return 1.0

    @property
    def broken(self) -> str:
        """The part of the rule that this variant breaks, or nothing."""
        if self.error or self.dtype == "fp32":
            return self.error
        if self.products > self.allowed:
            return f"{self.products:.2f} times the products"
        if self.inside:
            return f"{self.inside} accesses of spilled registers in hot loops"
        return f"{self.spills} bytes spilled" if self.spills > MOST_SPILLED else ""


@dataclass(frozen=True)
class LoopRow(Head):
    """One iteration of hot loop number `loop` of a variant, in the order of its code; see `sass.Loop`.

    `programs` fit on an SM, of whose matrix units they reach `share` at most. Consumers of one program count as
    programs, each with its own loops.
    """

    registers: int
    shared: int
    programs: int
    loop: int
    products: int
    tensor: float
    special: float
    float32: float
    integer: float
    memory: float
    issue: float
    busy: float
    share: float


def _target(arch: str):
    from triton.backends.compiler import GPUTarget

    lanes = ARCHITECTURES[arch].lanes
    amd = arch.startswith("gfx")
    return GPUTarget("hip", arch, lanes) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), lanes)


def _nvidia_usage(ptx: str, cubin: bytes, arch: str) -> tuple[int, int]:
    """Registers and bytes spilled a thread. Without a stack nothing spills; the assembler says what a stack holds."""
    from triton import knobs

    tools = knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        code, text = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        code.write_bytes(cubin)
        command = [tools.cuobjdump.path, "-res-usage", str(code)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        registers, stack = (int(x) for x in re.findall(r"REG:(\d+) STACK:(\d+)", usage)[-1])
        if not stack:
            return registers, 0
        text.write_text(ptx)
        assembler = tools.ptxas_blackwell if int(arch.removeprefix("sm_")) >= 100 else tools.ptxas
        target = re.findall(r"\.target (\w+)", ptx)[0]
        command = [assembler.path, "-v", f"--gpu-name={target}", str(text), "-o", str(code)]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return registers, max(int(x) for x in re.findall(r"(\d+) bytes spill", log))


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers and bytes of scratch a thread."""
    registers = re.findall(r"\.vgpr_count:\s+(\d+)", assembly)[-1]
    scratch = re.findall(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[-1]
    return int(registers), int(scratch)


def _variants(operator: str, arch: str) -> list:
    module = import_module(f"{DECLARED[operator].package}.aot")
    known = ARCHITECTURES[arch]
    found = list(module.variants(device=known.device, tf32=arch.startswith("sm_"), descriptors=known.descriptors))
    found += module.gluon_variants() if arch == "sm_90" and hasattr(module, "gluon_variants") else ()
    return [variant for variant in found if known.e4m3 or "e4m3" not in variant.flags]


def _head(operator: str, variant, arch: str) -> tuple:
    """The fields that rows begin with."""
    tiles = ("×".join(map(str, variant.queries)), "×".join(map(str, variant.keys)))
    head = (operator, variant.kernel, variant.grid, variant.dtype, variant.head_dim, variant.flags, *tiles)
    return (*head, variant.options.get("num_warps", 4), variant.options.get("num_stages", 0), arch)


def count_loops(operator: str, arch: str, index: int) -> list[LoopRow]:
    """Compile variant number `index` of an operator for an NVIDIA architecture and count its hot loops."""
    import triton

    variant = _variants(operator, arch)[index]
    head, warps = _head(operator, variant, arch), variant.options.get("num_warps", 4)
    kernel = triton.compile(variant.source, target=_target(arch), options=variant.options)
    registers, _ = _nvidia_usage(kernel.asm["ptx"], kernel.asm["cubin"], arch)
    shared, columns = kernel.metadata.shared, getattr(kernel.metadata, "tmem_size", 0) or 0
    needs = dict(registers=registers, shared=shared, warps=kernel.metadata.num_warps, tensor_columns=columns)
    programs = variant.consumers * sass.resident_programs(arch, **needs)
    rows = []
    for i, loop in enumerate(sass.hot_loops(sass.disassemble(kernel.asm["cubin"]), arch, warps)):
        counts = (loop.products, loop.tensor, loop.special, loop.float32, loop.integer, loop.memory, loop.issue)
        bound = (loop.busy(arch), loop.share(arch, programs))
        rows.append(LoopRow(*head, registers, shared, programs, i, *counts, *bound))
    return rows


def describe(operator: str, arch: str, index: int) -> Row:
    """Compile variant number `index` of an operator for an architecture."""
    import triton

    variant = _variants(operator, arch)[index]
    head = _head(operator, variant, arch)
    try:
        kernel = triton.compile(variant.source, target=_target(arch), options=variant.options)
        code = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
        registers, spills = (
            _amd_usage(code) if arch.startswith("gfx") else _nvidia_usage(code, kernel.asm["cubin"], arch)
        )
        inside = products.spilled_inside(kernel.asm, arch, variant.options.get("num_warps", 4)) if spills else 0
        repeated = products.repetition(kernel.asm["ttgir"])
    except Exception as error:  # every failure of the compiler is a row of the report, not the end of it
        return Row(*head, 0, 0, 0, 0, 0.0, False, False, f"{type(error).__name__}: {error}".strip().splitlines()[-1])
    shared, limit = kernel.metadata.shared, ARCHITECTURES[arch].shared
    error = f"shared memory exceeds {limit}" if shared > limit else ""
    found = (registers, spills, inside, shared, round(repeated, 2))
    return Row(*head, *found, "wgmma" in code, "cp.async.bulk.tensor" in code, error)


def _jobs(
    architectures: Sequence[str], operators: Sequence[str], select: dict[str, set] | None, sample: int | None
) -> list[tuple]:
    """Operator, architecture and number of the variants to compile."""
    jobs = []
    for operator, arch in product(operators, architectures):
        found = [
            index
            for index, variant in enumerate(_variants(operator, arch))
            if all(getattr(variant, field) in values for field, values in (select or {}).items())
        ]
        if sample is not None:
            found = sorted(Random(f"{operator}/{arch}").sample(found, min(sample, len(found))))
        jobs += [(operator, arch, index) for index in found]
    return jobs


def report(
    *,
    architectures: Sequence[str] = tuple(ARCHITECTURES),
    operators: Sequence[str] = OPERATORS,
    select: dict[str, set] | None = None,
    sample: int | None = None,
    workers: int | None = None,
) -> Iterator[Row]:
    """Rows of variants, in order, as they are compiled.

    Args:
        architectures: of `ARCHITECTURES`.
        operators: of `OPERATORS`.
        select: accepted values by field of `Row` that is known before compiling: kernel, grid, dtype, head_dim, flags.
        sample: variants of each operator and architecture, chosen at random and the same at every call; all when None.
        workers: processes; one a core when None.
    """
    jobs = _jobs(architectures, operators, select, sample)
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        yield from pool.map(describe, *zip(*jobs, strict=True)) if jobs else ()


def loop_report(
    *,
    architectures: Sequence[str] = tuple(sass.DEVICES),
    operators: Sequence[str] = OPERATORS,
    select: dict[str, set] | None = None,
    sample: int | None = None,
    workers: int | None = None,
) -> Iterator[LoopRow]:
    """Rows of the hot loops of all variants; arguments as `report` has them, architectures of `sass.DEVICES`.

    Raises:
        ValueError: an architecture whose machine code is not read.
    """
    if unknown := set(architectures) - set(sass.DEVICES):
        raise ValueError(
            f"architectures={sorted(unknown)} must be of {list(sass.DEVICES)}: loops are counted there only"
        )
    jobs = _jobs(architectures, operators, select, sample)
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        for rows in pool.map(count_loops, *zip(*jobs, strict=True)) if jobs else ():
            yield from rows


HEAD = {
    "kernel": 8,
    "grid": 9,
    "dtype": 5,
    "head_dim": 8,
    "flags": 13,
    "queries": 9,
    "keys": 9,
    "warps": 5,
    "stages": 6,
}
HEAD |= {"arch": 6, "registers": 9}
COLUMNS = HEAD | {"spills": 6, "inside": 6, "shared": 7, "products": 8, "wgmma": 5, "tma": 3, "broken": 0}  # widths
LOOP_COLUMNS = HEAD | {
    "shared": 7,
    "programs": 8,
    "loop": 4,
    "products": 8,
    "tensor": 6,
    "special": 7,
    "float32": 7,
    "integer": 7,
}
LOOP_COLUMNS |= {"memory": 6, "issue": 6, "busy": 6, "share": 5}


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if value < 10 else f"{value:.0f}"
    return "yes" if value is True else "" if value is False else str(value)


def _line(values: Sequence[object], columns: dict[str, int]) -> str:
    return "  ".join(_text(v).ljust(width) for v, width in zip(values, columns.values(), strict=True)).rstrip()


def _print_loops(rows: Iterator[LoopRow]) -> int:
    """Print rows; returns the exit code, 1 if there are none."""
    print(_line(list(LOOP_COLUMNS), LOOP_COLUMNS))
    code = 1
    for row in rows:
        code = 0
        print(_line([getattr(row, column) for column in LOOP_COLUMNS], LOOP_COLUMNS), flush=True)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m foveal.kernels.tools.compile_report", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES)
    parser.add_argument("--operator", nargs="+", choices=OPERATORS, default=OPERATORS)
    parser.add_argument("--kernel", nargs="+")
    parser.add_argument("--grid", nargs="+")
    parser.add_argument("--dtype", nargs="+", choices=("fp16", "bf16", "fp32"))
    parser.add_argument("--head-dim", nargs="+", type=int)
    parser.add_argument("--flags", nargs="*", help='of the variants, "" for plain ones')
    parser.add_argument("--sample", type=int, metavar="N", help="N variants of each operator and architecture")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--loop", action="store_true", help="count the instructions of the hot loops (NVIDIA)")
    options = parser.parse_args(arguments)
    chosen = {field: getattr(options, field) for field in ("kernel", "grid", "dtype", "head_dim", "flags")}
    select = {field: set(values) for field, values in chosen.items() if values}
    common: dict = dict(operators=options.operator, select=select, sample=options.sample, workers=options.workers)
    if options.loop:
        try:
            return _print_loops(loop_report(architectures=options.arch or tuple(sass.DEVICES), **common))
        except ValueError as error:
            parser.error(str(error))
    print(_line(list(COLUMNS), COLUMNS))
    failures = variants = 0
    for row in report(architectures=options.arch or tuple(ARCHITECTURES), **common):
        print(_line([getattr(row, column) for column in COLUMNS], COLUMNS), flush=True)
        variants += 1
        failures += bool(row.broken)
    print(f"{variants} variants, {failures} that break the rule")
    return int(failures > 0 or variants == 0)


if __name__ == "__main__":
    raise SystemExit(main())
