"""The Triton kernels of scan attention, run by Triton's interpreter on the CPU."""

from dataclasses import replace
from itertools import islice
from math import prod
from random import Random

import pytest
import torch
from foveal.kernels.ops import scan_attention
from foveal.kernels.scan import configs
from operator_matrix import LAYOUTS
from scan_matrix import Case, cases, check, make_inputs
from torch.utils.flop_counter import FlopCounterMode

QUICK = (  # by default; all others are slow
    "test_every_rule_matches_the_reference[delta",
    "test_flops",
    "test_long_heads",
)
CASES = 60
CHUNK = 10
GATED = Case((19,), heads=1, decay="token", delta=True, state=True, value_dim=12)


def affordable(case: Case) -> bool:
    """The interpreter takes about ten milliseconds a program: few slices of few tokens."""
    slices = case.batch * case.heads
    return slices <= 4 and slices * prod(case.shape) <= 120


def forced(case: Case) -> dict:
    """A launch that this case alone would not take: any chunk, blocks of features, 64-bit offsets."""
    random = Random(case.seed)
    return dict(chunk=random.choice((16, 32)), columns=random.choice((16, 32)), wide=random.random() < 0.3)


@pytest.mark.parametrize("case", [GATED, replace(GATED, delta=False, direction="backward")], ids=["delta", "additive"])
def test_every_rule_matches_the_reference(case):
    with configs.override(chunk=16):
        check(case, torch.float32, "triton")


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
    inputs = make_inputs(replace(GATED, layout=layout), torch.float32)
    packed = {n: x.detach().clone(memory_format=torch.contiguous_format) for n, x in inputs.items()}
    out = scan_attention(**inputs, impl="triton")
    assert torch.equal(out, scan_attention(**packed, impl="triton"))


@pytest.mark.parametrize("delta", [False, True])
def test_head_dim_128_with_the_pinned_sizes(delta):
    check(replace(GATED, delta=delta, head_dim=128, value_dim=128), torch.float32, "triton")


def test_tokens_alike_are_written_once():
    """With beta 1 and equal unit keys each token replaces what was stored; powers of a matrix would lose that."""
    key = torch.zeros(1, 64, 1, 16)
    key[..., 0] = 1
    value = torch.randn(1, 64, 1, 16)
    with configs.override(chunk=64):
        out = scan_attention(key, key, value, beta=torch.ones(1, 64, 1), impl="triton")
    torch.testing.assert_close(out, value, rtol=0, atol=1e-5)


def test_flops_are_counted():
    inputs = make_inputs(GATED, torch.float32)
    with FlopCounterMode(display=False) as counter:
        scan_attention(**inputs, impl="triton").sum().backward()
    assert counter.get_total_flops() == 3 * 6 * 19 * 8 * 12


def test_long_heads_are_refused():
    x = torch.zeros(1, 16, 1, 160)
    with pytest.raises(NotImplementedError, match="head_dim 160 exceeds 128"):
        scan_attention(x, x, x, impl="triton")
