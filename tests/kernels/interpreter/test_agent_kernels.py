"""The Triton kernels of agent attention, run by Triton's interpreter on the CPU."""

from dataclasses import replace
from itertools import islice
from math import prod
from random import Random

import pytest
import torch
from agent_matrix import Case, cases, check, make_inputs
from foveal.kernels.agent import configs
from foveal.kernels.ops import agent_attention
from operator_matrix import LAYOUTS
from torch.utils.flop_counter import FlopCounterMode

QUICK = (  # by default; all others are slow
    "test_random_cases_match_the_reference[0]",
    "test_a_bias_may_hide",
    "test_flops",
)
CASES, SLOW = 160, 60  # of random cases, and of those that are not exhaustive
CHUNK = 10
FULL = Case((5, 7), (4, 6), agents=9, heads=2, agent_bias=True, query_bias=True, query_scale=0.2)


def affordable(case: Case) -> bool:
    """The interpreter takes about five milliseconds a program and step: few slices of few tokens."""
    slices = case.batch * case.heads
    return slices <= 4 and slices * max(prod(case.shape), prod(case.key_shape), case.agents) <= 160


def forced(case: Case) -> dict:
    """A launch that this case alone would not take: any tile size, several parts of the long axis, 64-bit offsets."""
    random = Random(case.seed)
    sizes = (16, 32, 64) if max(prod(case.shape), prod(case.key_shape)) <= 48 else (32, 64)
    queries, keys = random.choice(sizes), random.choice(sizes)
    return dict(queries=queries, keys=keys, chunk=random.choice((1, 64, 10**6)), wide=int(random.random() < 0.3))


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_cases_match_the_reference(first):
    affordable_cases = list(islice(filter(affordable, cases(10**6, seed=1)), CASES))
    for case in affordable_cases[first : first + CHUNK]:
        with configs.override(**forced(case)):
            check(case, torch.float32, "triton")


def test_half_precision_keeps_the_error_rule():
    for case in islice(filter(affordable, cases(10**6, seed=2)), 8):
        check(case, torch.float16, "triton")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_in_place(layout):
    """Every layout gives the bits of a contiguous copy."""
    inputs = make_inputs(replace(FULL, layout=layout), torch.float32)
    packed = {n: x.detach().clone(memory_format=torch.contiguous_format) for n, x in inputs.items()}
    out = agent_attention(**inputs, **FULL.options, impl="triton")
    assert torch.equal(out, agent_attention(**packed, **FULL.options, impl="triton"))


def test_head_dim_256_with_the_pinned_tiles():
    check(replace(FULL, head_dim=256, heads=1, shape=(20,), key_shape=(17,)), torch.float32, "triton")


@pytest.mark.parametrize("head_dim, value_dim", [(64, 256), (256, 64), (1, 40)])
def test_head_dims_of_keys_and_values_may_differ(head_dim, value_dim):
    case = replace(FULL, head_dim=head_dim, value_dim=value_dim, heads=1, shape=(20,), key_shape=(17,))
    check(case, torch.float32, "triton")
    with configs.override(chunk=16, queries=16, keys=16):  # merged parts, and partial gradients
        check(case, torch.float32, "triton")


def test_more_agents_than_a_tile_holds():
    check(replace(FULL, agents=81, heads=1), torch.float32, "triton")


def test_a_bias_may_hide_keys_from_agents_and_agents_from_queries():
    """Minus infinity hides, also where a whole part of the keys is hidden."""
    inputs = make_inputs(replace(FULL, key_shape=(64,)), torch.float64)
    with torch.no_grad():
        inputs["agent_bias"][:, :5, :40] = float("-inf")
        inputs["query_bias"][:, ::2, 1:] = float("-inf")
    exact = agent_attention(**inputs, impl="reference")
    single = {name: x.float() for name, x in inputs.items()}
    with configs.override(queries=16, keys=16, chunk=16):
        out = agent_attention(**single, impl="triton")
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_flops_are_counted():
    inputs = make_inputs(FULL, torch.float32)
    with FlopCounterMode(display=False) as counter:
        agent_attention(**inputs, impl="triton").sum().backward()
    products = 2 * FULL.heads * FULL.head_dim * FULL.agents * (35 + 24)
    assert counter.get_total_flops() == (2 + 5) * products
