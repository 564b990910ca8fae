"""The Triton kernels of window attention, run by Triton's interpreter on the CPU."""

from dataclasses import replace
from functools import partial
from itertools import islice
from math import prod
from random import Random

import pytest
import torch
from foveal.kernels.ops import window_attention
from foveal.kernels.window import configs
from foveal.kernels.window.call import WindowCall, window_operator
from operator_matrix import opcheck
from torch.utils.flop_counter import FlopCounterMode
from window_matrix import TENSORS, Case, cases, check, make_inputs, run

QUICK = (  # by default; all others are slow
    "test_random_cases_match_the_reference[1-0]",
    "test_random_cases_match_the_reference[2-0]",
    "test_random_cases_match_the_reference[3-0]",
    "test_nan_in_a_key",
    "test_memory_around",
    "test_flops",
    "test_second_derivatives",
    "test_unknown_overrides",
)
CASES = 60
CHUNK = 3
FULL = Case((9, 11), (4, 3), (2, 1), (0, 0), heads=2, key_heads=1, bias=True, batch=2)
HALO = Case((5, 7), (2, 3), (0, 0), (1, 2), padded=True, bias=True)


def affordable(case: Case) -> bool:
    """The interpreter takes about ten milliseconds a program: few windows and heads, few keys beside one's own."""
    around = prod(2 * -(-h // w) + 1 for h, w in zip(case.halo, case.window, strict=True))
    return case.batch * case.heads * prod(a.windows for a in case.axes) * around <= 60


def forced(case: Case) -> dict:
    """A launch that this case alone would not take: any tile size, 64-bit offsets, one backward kernel or several."""
    random = Random(case.seed)
    return dict(rows=random.choice((16, 32, 64)), wide=random.random() < 0.3, one_pass=random.random() < 0.5)


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_random_cases_match_the_reference(rank, first):
    for case in islice(filter(affordable, cases(rank, 10**6, seed=3)), first, first + CHUNK):
        with configs.override(**forced(case)):
            check(case, torch.float32, "triton")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_half_precision_keeps_the_error_rule(rank):
    for case in islice(filter(affordable, cases(rank, 10**6, seed=4)), 8):
        check(case, torch.float16, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the backward has several kernels, or one
@pytest.mark.parametrize(
    "case",
    [
        Case((8, 12), (2, 2), (0, 0), (0, 0), bias=True),  # many windows in a tile
        Case((14, 14), (7, 7), (3, 3), (0, 0), heads=1, key_heads=1, bias=True),
        Case((4, 7, 7), (4, 7, 7), (0, 0, 0), (0, 0, 0), heads=1, key_heads=1, bias=True),  # many tiles
        FULL,
        HALO,
        replace(FULL, head_dim=8, value_dim=24),  # the backward of half precision has one kernel
        replace(FULL, head_dim=64, value_dim=256, heads=1, batch=1),
    ],
)
def test_pinned_tiles_are_right(case, dtype):
    """The launches that users get: no override."""
    check(case, dtype, "triton")


def test_gradients_are_the_same_bits_every_time():
    for case in (FULL, HALO):
        inputs = make_inputs(case, torch.float32)
        first, second = run(case, inputs, "triton"), run(case, inputs, "triton")
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_nan_in_a_key_stays_in_its_window():
    query, key, value = torch.randn(3, 1, 8, 8, 1, 8)
    key[0, 5, 6] = float("nan")
    out = window_attention(query, key, value, window=2, impl="triton")  # all windows share a tile
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[4:6, 6:8] = True
    assert torch.equal(out.isnan().all(-1)[0, :, :, 0], expected)
    assert torch.equal(out.isnan().any(-1)[0, :, :, 0], expected)


def test_memory_around_the_tensors_is_not_read():
    """Slices of a buffer full of NaN give what copies of them give, to the bit."""
    buffer = torch.full((3, 2, 11, 13, 4, 12), float("nan"))
    inside = buffer[:, :1, 1:10, 1:12, 1:3, :8]
    inside.copy_(torch.randn(inside.shape, generator=torch.Generator().manual_seed(0)))
    for options in (dict(window=(4, 3), shift=1), dict(window=3, halo=2)):
        out = window_attention(*inside, **options, impl="triton")
        assert torch.equal(out, window_attention(*inside.contiguous(), **options, impl="triton"))
        assert out.isfinite().all()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", [FULL, replace(HALO, value_dim=12), Case((13,), (5,), (2,), (0,), layout="fused")])
def test_opcheck(case, requires_grad):
    inputs = make_inputs(case, torch.float32)
    tensors = [x if x is None else x.detach().requires_grad_(requires_grad) for x in (inputs[n] for n in TENSORS)]
    opcheck(window_operator, "triton", tensors[:3], WindowCall(case.axes, 0.5, tensors[3]), 1e-4)


def test_only_what_requires_a_gradient_gets_one():
    for case in (FULL, HALO):
        inputs = make_inputs(case, torch.float32)
        inputs["bias"].requires_grad_(False)
        window_attention(**inputs, **case.options, impl="triton").sum().backward()
        assert inputs["bias"].grad is None and inputs["key"].grad is not None


def test_compiled_whole_for_any_size():
    torch._dynamo.reset()
    compiled = torch.compile(
        partial(window_attention, return_lse=True), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    with torch._dynamo.config.patch(recompile_limit=1):
        for shape in ((13, 14), (15, 11), (17, 19)):  # no length equals that of another dimension
            check(replace(FULL, shape=shape), torch.float32, "triton", operator=compiled)


def test_flops_are_counted():
    query, key, value = (x.requires_grad_() for x in torch.randn(3, 2, 8, 12, 3, 16))
    with FlopCounterMode(display=False) as counter:
        window_attention(query, key, value, window=(4, 3), impl="triton").sum().backward()
    products = 2 * 2 * 3 * 16 * 96 * 12  # two FLOPs, batch, heads, head_dim, queries, keys a query sees
    assert counter.get_total_flops() == (2 + 5) * products


def test_second_derivatives_are_refused():
    query, key, value = (x.requires_grad_() for x in torch.randn(3, 1, 4, 4, 1, 8))
    out = window_attention(query, key, value, window=2, impl="triton")
    with pytest.raises(RuntimeError, match=r"double backward|differentiate"):
        (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        torch.autograd.grad(gradient.sum(), query)


def test_unknown_overrides_are_refused():
    with pytest.raises(TypeError, match="threads"), configs.override(threads=3):
        pass
