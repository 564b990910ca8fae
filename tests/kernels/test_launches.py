"""Calls go through Triton's own specialisation of arguments and compile for sm_90, without a device."""

from contextvars import copy_context

import pytest
import torch
import triton
from foveal.kernels.block_sparse import configs as block_sparse
from foveal.kernels.neighborhood import configs as neighborhood
from foveal.kernels.ops import (
    BlockMask,
    agent_attention,
    block_sparse_attention,
    linear_attention,
    na2d,
    routing_attention2d,
    scan_attention,
    scored_attention,
    window_attention,
)
from foveal.kernels.scored import ColumnMask, CoPE, Softplus
from foveal.kernels.tools import compile_report
from launch_driver import launches


def leaves(*shape: int) -> list[torch.Tensor]:
    """Query, key and value as they are cut from one projection, so that outer strides differ from a tensor's own."""
    return [
        x.detach().requires_grad_() for x in torch.randn(*shape[:-2], 3, *shape[-2:], dtype=torch.bfloat16).unbind(-3)
    ]


def call_neighborhood(descriptor: bool) -> torch.Tensor:
    extra = torch.randn(2, 2, 5, 2, 16, dtype=torch.bfloat16).requires_grad_().unbind(0)
    bias = torch.randn(2, 5, 5, requires_grad=True)
    query, key, value = leaves(2, 9, 12, 2, 16)
    given: dict = dict(additional_keys=extra[0], additional_values=extra[1])
    if descriptor:  # with masked extra keys, and values of their own width
        value = leaves(2, 9, 12, 2, 32)[2]
        given = dict(
            additional_keys=extra[0],
            additional_values=extra[1].repeat(1, 1, 1, 2),
            additional_mask=torch.tensor([5, 2]),
        )
    with neighborhood.override(size=neighborhood.Size(16, 16, 4, 1), descriptor=descriptor):
        out = na2d(query, key, value, window=3, bias=bias, **given, impl="triton")
        out.sum().backward()  # an expanded gradient: strides of zero
    return out


def call_neighborhood_e4m3() -> None:
    with torch.no_grad():
        extra = torch.randn(2, 2, 5, 2, 32, dtype=torch.bfloat16).unbind(0)
        tensors, options = leaves(2, 9, 12, 2, 32), dict(window=3, bias=torch.randn(2, 5, 5), impl="triton")
        na2d(*tensors, additional_keys=extra[0], additional_values=extra[1], qk_dtype=torch.float8_e4m3fn, **options)


def call_window() -> None:
    bias = torch.randn(2, 16, 16, requires_grad=True)
    window_attention(*leaves(2, 8, 12, 2, 24), window=4, shift=2, bias=bias, impl="triton").sum().backward()


def call_block_sparse() -> None:
    routing_attention2d(*leaves(1, 14, 14, 2, 16), topk=2, impl="triton").sum().backward()
    query, key, value = leaves(2, 8, 2, 16)
    extra = torch.randn(2, 2, 5, 2, 16, dtype=query.dtype).requires_grad_().unbind(0)
    lists = torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    additional = {"additional_keys": extra[0], "additional_values": extra[1], "additional_mask": torch.tensor([5, 2])}
    mask = BlockMask((4,), (4,), *lists)
    block_sparse_attention(query, key, value, mask=mask, **additional, impl="triton").sum().backward()


def call_block_sparse_whole() -> None:
    """Boxes that an iteration loads whole, by descriptors; in the second call with `skip_threshold`."""
    query, key, value = leaves(1, 128, 2, 64)
    lists = torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    mask = BlockMask((64,), (64,), *lists).with_inverse((128,))
    with block_sparse.override(descriptor=True):
        block_sparse_attention(query, key, value, mask=mask, impl="triton").sum().backward()
        block_sparse_attention(query.detach(), key.detach(), value, mask=mask, skip_threshold=0.1, impl="triton")


def call_block_sparse_int8() -> None:
    """With additional keys across blocks, and whole blocks by descriptors."""
    with torch.no_grad():
        query, key, value = leaves(1, 128, 2, 64)
        extra = torch.randn(2, 1, 5, 2, 64, dtype=query.dtype).unbind(0)
        lists = torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 1, dtype=torch.int32)
        given = {"mask": BlockMask((64,), (64,), *lists), "qk_dtype": torch.int8, "impl": "triton"}
        additional = {"additional_keys": extra[0], "additional_values": extra[1]}
        for whole in (False, True):
            with block_sparse.override(whole=whole, descriptor=whole):
                block_sparse_attention(query, key, value, **given, **additional)


def call_agent() -> None:
    token = torch.randn(2, 9, 2, 16, dtype=torch.bfloat16).requires_grad_()
    agent_attention(*leaves(2, 8, 8, 2, 16), token, impl="triton").sum().backward()


def call_linear() -> None:
    linear_attention(*leaves(2, 8, 8, 2, 16), relu=True, floor=100.0, impl="triton").sum().backward()


def call_scan() -> None:
    query, key, value = leaves(2, 9, 8, 2, 16)
    gates = [torch.rand(2, 9, 8, 2, requires_grad=True) for _ in range(2)]
    scan_attention(query, key, value, log_decay=-gates[0], beta=gates[1], impl="triton").sum().backward()


def call_scored() -> None:
    query, key, value = leaves(2, 9, 8, 2, 16)
    table = torch.randn(16, 5, requires_grad=True)
    mask = ColumnMask.causal(72)
    scored_attention(query, key, value, score=CoPE(table), mask=mask, impl="triton").sum().backward()
    scored_attention(query, key, value, score=Softplus(3.0), mask=mask, impl="triton").sum().backward()


CALLS = {
    "neighborhood": (lambda: call_neighborhood(False), {"forward", "query", "key", "table", "extra"}),
    "neighborhood, descriptors": (lambda: call_neighborhood(True), {"forward", "query", "key", "table", "extra"}),
    "neighborhood, e4m3": (call_neighborhood_e4m3, {"forward"}),
    "window": (call_window, {"forward", "window"}),
    "block_sparse": (call_block_sparse, {"forward", "query", "count", "place", "key", "extra"}),
    "block_sparse, whole": (call_block_sparse_whole, {"forward", "query", "key"}),
    "block_sparse, int8": (call_block_sparse_int8, {"forward"}),
    "agent": (call_agent, {"forward", "query", "key"}),
    "linear": (call_linear, {"state", "apply", "query", "key"}),
    "scored": (call_scored, {"count", "forward", "query", "key"}),
    "scan": (call_scan, {"solve", "state", "output", "decay"}),
}


def test_every_operator_is_launched():
    assert {name.split(",")[0] for name in CALLS} == set(compile_report.OPERATORS)


@pytest.mark.parametrize("name", CALLS)
def test_every_kernel_of_a_call_compiles_once(name):
    call, kernels = CALLS[name]
    with launches() as driver:
        call()
        compiled = list(driver.compiled)
        call()
    assert {f"{kernel}_kernel" for kernel in kernels} == set(driver.launched)
    assert driver.compiled == compiled


def test_descriptors_find_memory_and_the_allocator_of_the_caller_stays():
    def own(size, alignment, stream):
        raise AssertionError("of the caller")

    def program():
        triton.set_allocator(own)
        with launches() as driver:
            call_neighborhood(True)
            call_block_sparse_whole()
        assert driver.with_scratch == driver.launched
        return own in copy_context().values()

    assert copy_context().run(program)


def test_images_of_any_size_take_few_kernels():
    torch.manual_seed(0)
    sizes = [(66, 36), (43, 37), (69, 70), (44, 20), (20, 60), (34, 39), (51, 52), (47, 42), (57, 64), (56, 48)]
    with launches() as driver, torch.no_grad():
        for size in sizes:
            na2d(*leaves(1, *size, 3, 32), window=7, impl="triton")
    assert len(driver.launched) == len(sizes)
    # tiles of 32 tokens, 4x8 or 8x4, by keys of the same shape or twice as long: within a tenth of the least clocks
    assert len(driver.compiled) <= 4
