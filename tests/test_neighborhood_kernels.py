"""The Triton kernels without a device: values by Triton's interpreter, code by its compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from foveal.kernels import report

pytest.importorskip("triton")
INTERPRETER = Path(__file__).parent / "interpreter"


@pytest.mark.parametrize("part", ["[1-", "[2-", "[3-", "not random"])
def test_interpreter(part):
    """The tests under `interpreter/`, in a process where Triton interprets its kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(INTERPRETER)]
    command += ["-k", part if part == "not random" else f"random and {part}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=INTERPRETER.parents[1])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def check_report(*, unspilled=lambda row: True, **kwargs) -> None:
    rows = list(report.report(**kwargs))
    broken = [row for row in rows if row.error or (row.spills and unspilled(row))]
    assert rows and not broken, "\n".join(map(str, broken))
    for row in rows:
        if row.arch == "sm_90" and row.kernel in ("forward", "query", "key"):
            assert row.tma, row
            assert row.wgmma or row.dtype == "fp32" or row.head_dim == 256, row


@pytest.mark.parametrize("arch", report.ARCHITECTURES)
def test_kernels_compile_without_spills(arch):
    """Head dim 64; `python -m foveal.kernels.report` and the slow test do all others."""
    select = {"grid": {"7x7"}, "head_dim": {64}, "dtype": {"bf16"}, "flags": {"", "bias", "extra", "bias, extra"}}
    if arch == "sm_90":
        select |= {"dtype": {"bf16", "fp32"}}
        del select["flags"]
    check_report(architectures=[arch], select=select)


@pytest.mark.slow
@pytest.mark.parametrize("arch", report.ARCHITECTURES)
def test_every_pinned_size_compiles_without_spills(arch):
    """All but the backward of float32 at head dim 256, whose rows alone fill the registers."""
    check_report(architectures=[arch], unspilled=lambda row: not (row.dtype == "fp32" and row.head_dim == 256))
