"""The Triton kernels of window attention without a device."""

import kernel_checks
import pytest
from foveal.kernels.tools import compile_report

pytest.importorskip("triton")


def test_interpreter():
    """Quick tests under `interpreter/`, in a process where Triton interprets its kernels."""
    kernel_checks.run_interpreter("test_window_kernels.py")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["random", "not random"])
def test_interpreter_on_everything(part):
    kernel_checks.run_interpreter("test_window_kernels.py", part, marker="slow")


def test_kernels_compile():
    """Head dim 32 with a bias; `test_every_pinned_size_keeps_the_rule` does others."""
    select = {"grid": {"7x7"}, "head_dim": {32}, "dtype": {"bf16"}, "flags": {"bias"}}
    kernel_checks.check_report(operators=["window"], architectures=["sm_90"], select=select)


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", compile_report.ARCHITECTURES)
def test_every_pinned_size_keeps_the_rule(arch):
    kernel_checks.check_report(operators=["window"], architectures=[arch], unspilled=kernel_checks.must_not_spill)
