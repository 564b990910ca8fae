"""The Triton kernels of neighborhood attention without a device."""

import kernel_checks
import pytest
from foveal.kernels import report
from foveal.kernels.neighborhood import configs
from foveal.kernels.neighborhood.geometry import Axis

pytest.importorskip("triton")


@pytest.mark.parametrize("part", ["[1-", "[2-", "[3-", "not random"])
def test_interpreter(part):
    """The tests under `interpreter/`, in a process where Triton interprets its kernels."""
    select = part if part == "not random" else f"random and {part}"
    kernel_checks.run_interpreter("test_neighborhood_kernels.py", select)


@pytest.mark.parametrize("kernel", ["forward", "query", "key"])
def test_descriptors_where_a_program_has_many_tiles(kernel):
    def addresses(window: int, descriptor: bool) -> bool:
        known: dict = dict(head_dim=32, itemsize=2, device="hopper", descriptor=descriptor, wide=False)
        return configs.choose(kernel, (Axis(56, window), Axis(56, window)), **known).descriptor

    assert [addresses(window, descriptor=True) for window in (7, 29)] == [False, True]
    assert not addresses(29, descriptor=False)


def check_report(**kwargs) -> None:
    for row in kernel_checks.check_report(operators=["neighborhood"], **kwargs):
        if row.arch == "sm_90" and row.kernel in ("forward", "query", "key"):
            assert row.tma or (row.grid == "7x7" and row.head_dim == 32), row
            assert row.wgmma or row.dtype == "fp32" or row.head_dim == 256, row


@pytest.mark.parametrize("arch", report.ARCHITECTURES)
def test_kernels_compile_without_spills(arch):
    """Head dim 64; `python -m foveal.kernels.report` and the slow test do all others."""
    select = {"grid": {"7x7"}, "head_dim": {64}, "dtype": {"bf16"}, "flags": {"", "bias", "extra", "bias, extra"}}
    if arch == "sm_90":
        select |= {"dtype": {"bf16", "fp32"}, "grid": {"21x21"}}  # with wholly visible tiles, too
        del select["flags"]
    check_report(architectures=[arch], select=select)


@pytest.mark.slow
@pytest.mark.parametrize("arch", report.ARCHITECTURES)
def test_every_pinned_size_compiles_without_spills(arch):
    """All but the backward of float32 at head dim 256, whose rows alone fill the registers."""
    check_report(architectures=[arch], unspilled=lambda row: not (row.dtype == "fp32" and row.head_dim == 256))
