"""The Triton kernels on memory and orders of programs that no device promises, in Triton's interpreter."""

import kernel_checks
import pytest

pytest.importorskip("triton")


def test_interpreter():
    kernel_checks.run_interpreter("test_hostile_memory.py")


@pytest.mark.slow
def test_interpreter_on_more_cases():
    kernel_checks.run_interpreter("test_hostile_memory.py", marker="slow")
