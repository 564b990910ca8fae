"""The Triton kernels of linear attention without a device."""

import kernel_checks
import pytest
from foveal.kernels.tools import compile_report

pytest.importorskip("triton")


def test_interpreter():
    """Quick tests under `interpreter/`, in a process where Triton interprets its kernels."""
    kernel_checks.run_interpreter("test_linear_kernels.py")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["random", "not random"])
def test_interpreter_on_everything(part):
    kernel_checks.run_interpreter("test_linear_kernels.py", part, marker="slow")


def test_kernels_compile_without_spills():
    """Head dim 32 with ReLU and a floor; `test_every_pinned_size_keeps_the_rule` does others."""
    select = {"grid": {"32"}, "dtype": {"bf16"}, "flags": {"floor"}}
    rows = kernel_checks.check_report(operators=["linear"], architectures=["sm_90"], select=select)
    assert {row.kernel for row in rows} == {"state", "apply", "query", "key"}
    # the others multiply fewer than 64 rows at a time
    assert {row.kernel for row in rows if row.wgmma} == {"apply", "key"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", compile_report.ARCHITECTURES)
def test_every_pinned_size_keeps_the_rule(arch):
    kernel_checks.check_report(operators=["linear"], architectures=[arch])
