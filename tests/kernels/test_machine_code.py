"""Machine code of every operator for every architecture, without a device."""

import kernel_checks
import pytest
import triton
from foveal.kernels.tools import compile_report
from triton.backends.compiler import GPUTarget


@pytest.mark.slow
@pytest.mark.parametrize("arch", compile_report.ARCHITECTURES)
@pytest.mark.parametrize("operator", compile_report.OPERATORS)
def test_a_sample_of_the_variants_compiles(operator, arch):
    """And has room in shared memory; `test_every_pinned_size_keeps_the_rule` of each operator asks for more."""
    rows = kernel_checks.check_report(
        operators=[operator], architectures=[arch], sample=3, workers=1, unspilled=lambda row: False
    )
    assert len(rows) == 3


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["block_sparse", "neighborhood", "window"])
def test_rows_of_whole_16_bytes_are_loaded_16_at_a_time(operator):
    """Where the head dim is 72, which Triton does not take for aligned by itself."""
    known = compile_report._variants(operator, "sm_80")
    variants = [x for x in known if (x.head_dim, x.dtype) == (72, "bf16") and x.flags != "int8"]  # rows of 72 bytes
    assert len(variants) >= 3
    for variant in variants:
        ptx = triton.compile(variant.source, target=GPUTarget("cuda", 80, 32), options=variant.options).asm["ptx"]
        assert "ld.global.v4.b32" in ptx and "ld.global.b16" not in ptx, variant.kernel
