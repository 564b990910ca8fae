"""Machine code of every operator for every architecture, without a device."""

import kernel_checks
import pytest
from foveal.kernels.tools import compile_report


@pytest.mark.slow
@pytest.mark.parametrize("arch", compile_report.ARCHITECTURES)
@pytest.mark.parametrize("operator", compile_report.OPERATORS)
def test_a_sample_of_the_variants_compiles(operator, arch):
    """And has room in shared memory; `test_every_pinned_size_keeps_the_rule` of each operator asks for more."""
    rows = kernel_checks.check_report(
        operators=[operator], architectures=[arch], sample=6, workers=1, unspilled=lambda row: False
    )
    assert len(rows) == 6
