"""Facts of tensors and settings that launches depend on, without a device."""

from contextvars import copy_context

import pytest
import torch
from foveal.kernels.common import launching


@pytest.fixture
def matrix_units(monkeypatch):
    """As if the CPU had NVIDIA's matrix units; what is set of their precision is taken back."""
    monkeypatch.setattr(launching, "has_tf32", lambda device: True)
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("allow", ["high", "medium"])
def test_products_are_exact_unless_tf32_is_allowed(matrix_units, allow):
    query = torch.empty(1)
    assert launching.precision(query) == "tf32x3"
    torch.set_float32_matmul_precision(allow)
    assert launching.precision(query) == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert launching.precision(query) == "tf32x3"
    assert launching.precision(query.half()) == "ieee"


def test_products_are_exact_unless_the_backend_allows_tf32(matrix_units):
    query = torch.empty(1)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert launching.precision(query) == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert launching.precision(query) == "tf32x3"


def test_launches_leave_the_allocator_of_the_caller():
    triton = pytest.importorskip("triton")

    def own(size, alignment, stream):
        raise AssertionError("of the caller")

    def allocators() -> set:
        return {x for x in copy_context().values() if x in (own, launching.device_scratch)}

    def program():
        triton.set_allocator(own)
        assert launching.with_scratch(allocators)() == {launching.device_scratch}
        with pytest.raises(ZeroDivisionError):
            launching.with_scratch(lambda: 1 / 0)()
        return allocators()

    assert copy_context().run(program) == {own}
