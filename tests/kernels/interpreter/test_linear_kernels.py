"""The Triton kernels of linear attention, run by Triton's interpreter on the CPU."""

from dataclasses import replace
from itertools import islice
from math import prod
from random import Random

import pytest
import torch
from foveal.kernels.linear import configs
from foveal.kernels.ops import linear_attention
from linear_matrix import Case, cases, check, check_first_token_far_away, check_large_means, make_inputs
from operator_matrix import LAYOUTS
from torch.utils.flop_counter import FlopCounterMode

QUICK = (  # by default; all others are slow
    "test_random_cases_match_the_reference[0]",
    "test_large_means",
    "test_the_first_token",
    "test_not_a_number",
    "test_flops",
    "test_long_heads",
)
CASES = 80
CHUNK = 10
FLOOR = Case((5, 7), (4, 6), heads=2, relu=True, floor=20.0, scale=None)
CENTERED = replace(FLOOR, floor=None, centered=True, value_dim=12)


def affordable(case: Case) -> bool:
    """The interpreter takes about five milliseconds a program and step: few slices of few tokens."""
    slices = case.batch * case.heads
    return slices <= 4 and slices * max(prod(case.shape), prod(case.key_shape)) <= 160


def forced(case: Case) -> dict:
    """A launch that this case alone would not take: any tile, several parts, blocks of features, 64-bit offsets."""
    random = Random(case.seed)
    rows = random.choice((16, 32, 64) if max(prod(case.shape), prod(case.key_shape)) <= 48 else (32, 64))
    chunk = random.choice((1, 64, 10**6))
    return dict(rows=rows, chunk=chunk, columns=random.choice((16, 32, 64)), wide=random.random() < 0.3)


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_cases_match_the_reference(first):
    affordable_cases = list(islice(filter(affordable, cases(10**6, seed=1)), CASES))
    for case in affordable_cases[first : first + CHUNK]:
        with configs.override(**forced(case)):
            check(case, torch.float32, "triton")


def test_half_precision_keeps_the_error_rule():
    for case in islice(filter(affordable, cases(10**6, seed=2)), 12):
        check(case, torch.float16, "triton")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_in_place(layout):
    """Every layout gives the bits of a contiguous copy."""
    inputs = make_inputs(replace(FLOOR, layout=layout), torch.float32)
    packed = {n: x.detach().clone(memory_format=torch.contiguous_format) for n, x in inputs.items()}
    out = linear_attention(**inputs, **FLOOR.options, impl="triton")
    assert torch.equal(out, linear_attention(**packed, **FLOOR.options, impl="triton"))


def test_scales_of_any_stride():
    inputs = {name: x.detach() for name, x in make_inputs(FLOOR, torch.float32).items()}
    strided = inputs | {"scale": inputs["scale"].repeat_interleave(3)[::3]}
    outs = [linear_attention(**given, **FLOOR.options, impl="triton") for given in (inputs, strided)]
    assert strided["scale"].stride() == (3,) and torch.equal(*outs)


@pytest.mark.parametrize("case", [FLOOR, CENTERED], ids=["floor", "centered"])
def test_head_dim_128_with_the_pinned_tiles(case):
    check(replace(case, head_dim=128, value_dim=128, heads=1, shape=(20,), key_shape=(17,)), torch.float32, "triton")


@pytest.mark.parametrize("head_dim, value_dim", [(24, 1), (1, 48), (128, 16), (16, 128), (16, 300)])
def test_head_dims_of_keys_and_values_may_differ(head_dim, value_dim):
    case = replace(FLOOR, head_dim=head_dim, value_dim=value_dim, heads=1)
    check(replace(case, scale=1.0), torch.float32, "triton")


def test_large_means_do_not_swallow_the_covariance():
    with configs.override(rows=16, chunk=16):
        check_large_means("triton")


def test_the_first_token_may_lie_far_away():
    check_first_token_far_away("triton")


def test_sums_of_float16_past_its_range():
    """65,504 is the largest: states are sums over all keys, and pass it long before the output does."""
    query = torch.full((1, 512, 1, 16), 0.5, dtype=torch.float16)
    key, value = torch.full_like(query, 16.0), torch.full_like(query, 32.0)
    out = linear_attention(query, key, value, eps=1e-6, impl="triton")
    torch.testing.assert_close(out, value)


def test_not_a_number_is_not_hidden_by_relu():
    inputs = {name: x.detach() for name, x in make_inputs(replace(FLOOR, scale=1.0), torch.float32).items()}
    inputs["query"][0, 0, 0, 0, 0] = float("nan")
    out = linear_attention(**inputs, **replace(FLOOR, scale=1.0).options, impl="triton")
    assert out[0, 0, 0, 0].isnan().all() and out[0, 1:].isfinite().all()


def test_flops_are_counted():
    inputs = make_inputs(CENTERED, torch.float32)
    with FlopCounterMode(display=False) as counter:
        linear_attention(**inputs, **CENTERED.options, impl="triton").sum().backward()
    assert counter.get_total_flops() == 3 * 2 * CENTERED.heads * 8 * 12 * (35 + 24)


def test_long_heads_are_refused():
    x = torch.zeros(1, 16, 1, 160)
    with pytest.raises(NotImplementedError, match="head_dim 160 exceeds 128"):
        linear_attention(x, x, x, impl="triton")
