"""Checks of Triton kernels without a device: values by Triton's interpreter, code by its compiler."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from foveal.kernels.tools import compile_report
from foveal.kernels.tools.compile_report import Row

INTERPRETER = Path(__file__).parents[1] / "kernels" / "interpreter"


def run_interpreter(file: str, select: str = "test", *, marker: str | None = None) -> None:
    """Run tests of `interpreter/<file>`, in a process where Triton interprets its kernels.

    Args:
        select: expression of names, as `pytest -k` takes it.
        marker: "slow" or "exhaustive"; the quick ones when None.
    """
    without = [word for plugin in ("cacheprovider", "xdist", "budget") for word in ("-p", f"no:{plugin}")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *without]
    command += [str(INTERPRETER / file), "-k", select, *([] if marker is None else ["-m", marker])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=INTERPRETER.parents[2])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def must_not_spill(row: Row) -> bool:
    """Whether the spill of a row is an error: not where rows of float32 fill the registers, nor up to a few bytes.

    These are 160 bytes a thread, and 40 in neighborhood attention, whose float32 is asked up to head dim 128. It may
    spill them only where bias and extra keys together, or float32, crowd head dims from 128 on, and where the assembler
    leaves a third of the registers free.
    """
    strict = row.operator == "neighborhood"
    longest = 256 if "values" in row.flags else row.head_dim  # values may be wider than keys
    if row.dtype == "fp32" and longest >= (256 if strict else 128):
        return False
    crowded = longest >= 128 and ("bias, extra" in row.flags or row.dtype == "fp32")
    if strict and not crowded and row.registers > 168:
        return spills_much(row)
    return row.spills > (40 if strict else 160)


def spills_much(row: Row) -> bool:
    """Whether the spill of a row breaks the report's own rule: more than a few bytes, or any inside of hot loops."""
    return row.inside > 0 or row.spills > compile_report.MOST_SPILLED


def check_report(*, unspilled: Callable[[Row], bool] = spills_much, **kwargs) -> list[Row]:
    """Rows of `compile_report.report(**kwargs)`, all compiled, none with a spill that `unspilled` forbids."""
    rows = list(compile_report.report(**kwargs))
    broken = [row for row in rows if row.error or (row.spills and unspilled(row))]
    assert rows and not broken, "\n".join(map(str, broken))
    return rows
