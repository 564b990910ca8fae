"""Checks of Triton kernels without a device: values by Triton's interpreter, code by its compiler."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from foveal.kernels import report

INTERPRETER = Path(__file__).parent / "interpreter"


def run_interpreter(file: str, select: str) -> None:
    """Run the tests of `interpreter/<file>` that match `select`, in a process where Triton interprets its kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [str(INTERPRETER / file), "-k", select]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=INTERPRETER.parents[1])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def spills_more_than_a_few(row: report.Row) -> bool:
    """Up to 160 bytes a thread are few; float32 from head dim 128 on, whose rows fill the registers, is not asked."""
    return row.spills > 160 and not (row.dtype == "fp32" and row.head_dim >= 128)


def check_report(*, unspilled: Callable[[report.Row], bool] = lambda row: True, **kwargs) -> list[report.Row]:
    """Rows of `report.report(**kwargs)`, all compiled, those for which `unspilled` holds without a spill."""
    rows = list(report.report(**kwargs))
    broken = [row for row in rows if row.error or (row.spills and unspilled(row))]
    assert rows and not broken, "\n".join(map(str, broken))
    return rows
