"""The Triton kernels of block-sparse attention without a device."""

import kernel_checks
import pytest
from foveal.kernels.tools import compile_report

pytest.importorskip("triton")


def test_interpreter():
    """Quick tests under `interpreter/`, in a process where Triton interprets its kernels."""
    kernel_checks.run_interpreter("test_block_sparse_kernels.py")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["random", "not random"])
def test_interpreter_on_everything(part):
    kernel_checks.run_interpreter("test_block_sparse_kernels.py", part, marker="slow")


def test_kernels_compile_without_spills():
    """Head dim 64 in bfloat16; `test_every_pinned_size_keeps_the_rule` does others."""
    select = {"grid": {"8x8"}, "head_dim": {64}, "dtype": {"bf16"}, "flags": {"", "bias, extra, lengths"}}
    rows = kernel_checks.check_report(operators=["block_sparse"], architectures=["sm_90"], select=select)
    assert all(row.wgmma for row in rows)


def test_big_boxes_are_loaded_by_descriptors():
    select = {"grid": {"4x4x8"}, "head_dim": {128}, "dtype": {"bf16"}, "flags": {""}, "kernel": {"forward", "key"}}
    rows = kernel_checks.check_report(operators=["block_sparse"], architectures=["sm_90"], select=select)
    assert len(rows) == 2 and all(row.wgmma and row.tma for row in rows)
    (loop,) = compile_report.loop_report(
        operators=["block_sparse"], architectures=["sm_90"], select=select | {"kernel": {"forward"}}
    )
    assert loop.products == 2 * 128 * 128 * 128  # each once: two products of 128 queries and 128 keys
    assert loop.share > 0.6


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", compile_report.ARCHITECTURES)
def test_every_pinned_size_keeps_the_rule(arch):
    kernel_checks.check_report(operators=["block_sparse"], architectures=[arch], unspilled=kernel_checks.must_not_spill)
