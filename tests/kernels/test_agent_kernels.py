"""The Triton kernels of agent attention without a device."""

import kernel_checks
import pytest
from foveal.kernels.tools import compile_report

pytest.importorskip("triton")


def test_interpreter():
    """Quick tests under `interpreter/`, in a process where Triton interprets its kernels."""
    kernel_checks.run_interpreter("test_agent_kernels.py")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["random", "not random"])
def test_interpreter_on_everything(part):
    kernel_checks.run_interpreter("test_agent_kernels.py", part, marker="slow")


def check_report(**kwargs) -> None:
    for row in kernel_checks.check_report(operators=["agent"], **kwargs):
        plain = row.dtype != "fp32" and row.head_dim == 64 and "values" not in row.flags
        if row.arch == "sm_90" and row.grid == "spread" and plain:
            assert row.wgmma, row


def test_kernels_compile_without_spills():
    """Head dim 64 with bias; `test_every_pinned_size_keeps_the_rule` does others."""
    select = {"grid": {"gather", "spread"}, "head_dim": {64}, "dtype": {"bf16"}, "flags": {"bias"}}
    check_report(architectures=["sm_90"], select=select)


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", compile_report.ARCHITECTURES)
def test_every_pinned_size_keeps_the_rule(arch):
    check_report(architectures=[arch], unspilled=kernel_checks.must_not_spill)
