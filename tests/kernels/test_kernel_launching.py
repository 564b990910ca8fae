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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_kernels_turn_strides_in_bytes_back(dtype):
    memory = pytest.importorskip("foveal.kernels.common.triton.memory")
    x = torch.empty(1, dtype=dtype)
    strides = (0, 1, 2, 3, 40, 1000003)
    *made, last = launching.kernel_strides(x, strides)
    if x.element_size() == 1:  # 40 bytes fill no 16
        assert (*made, last) == strides
    else:
        assert last is None and made == [0, 1, *(n * x.element_size() for n in strides[2:])]
        assert tuple(memory.element_stride.fn(n, x.element_size()) for n in made) == strides
    assert launching.kernel_strides(x, strides[:4]) == strides[:4]


def test_the_compiler_knows_what_strides_in_bytes_are_multiples_of():
    """Rows of 40 numbers in half precision, 80 bytes: loads of 16 bytes where the strides say so, else of 2."""
    triton = pytest.importorskip("triton")
    from strided_copy import copy_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"x_ptr": "*fp16", "strides": ("i32", "i32", "constexpr", "constexpr"), "out_ptr": "*fp16"}
    pointers = {place: [["tt.divisibility", 16]] for place in ((0,), (2,))}
    for known, load in ({(1, 0): 16, (1, 1): 16}, "ld.global.v4.b32"), ({(1, 0): 16}, "ld.global.b16"):
        attributes = pointers | {place: [["tt.divisibility", n]] for place, n in known.items()}
        made = ASTSource(copy_kernel, types, {(1, 2): 1, (1, 3): None}, attributes)
        assert load in triton.compile(made, target=GPUTarget("cuda", 80, 32)).asm["ptx"]


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


def test_vectors_stand_in_two_parts_where_that_saves_a_quarter():
    parts = launching.feature_parts
    assert [parts(n, "ampere") for n in (8, 16, 32, 64, 128)] == [(16,), (16,), (32,), (64,), (128,)]
    assert parts(40, "ampere") == (32, 16) and parts(40, "hopper") == (64,)  # where exponentials are the bound
    assert [parts(n, "hopper") for n in (72, 80, 96, 97, 104, 120)] == [(64, 16)] * 2 + [(64, 32)] + [(128,)] * 3
    assert [parts(n, "hopper", 256) for n in (129, 160, 161)] == [(128, 16), (128, 32), (256,)]
    assert parts(160, "hopper") == (256,)
    for n in range(1, 257):
        for longest in (128, 256):
            widths = parts(n, "amd", longest)
            assert sum(widths) >= n > sum(widths[:-1]) and all(w >= 16 and w & (w - 1) == 0 for w in widths)


def test_queries_and_keys_of_eight_bits_stand_in_one_part():
    """Matrix units take 32 of their numbers at a time."""
    assert launching.vectors(72, 80, "hopper", eight_bits=True) == (72, (128,), 80, (64, 16))
