"""The Triton kernels of scored attention, run by Triton's interpreter on the CPU."""

from dataclasses import replace
from itertools import islice, product
from math import prod
from random import Random

import pytest
import torch
from foveal.kernels.ops import scored_attention
from foveal.kernels.scored import Softmax, configs
from operator_matrix import LAYOUTS
from scored_matrix import KINDS, MASKS, Case, attend, cases, check, make_inputs
from torch.utils.flop_counter import FlopCounterMode

QUICK = (  # by default; all others are slow
    "test_every_formula_matches_the_reference",
    "test_flops",
    "test_long_heads",
)
CASES = 160
CHUNK = 10
FULL = Case((3, 7), key_shape=(4, 5), key_heads=1, mask="random")


def affordable(case: Case) -> bool:
    """The interpreter takes about ten milliseconds a program and step: few slices of few tokens."""
    slices = case.batch * case.heads
    return slices <= 4 and slices * max(prod(case.shape), prod(case.keys)) <= 120


def forced(case: Case) -> dict:
    """A launch that this case alone would not take: any tile size, 64-bit offsets."""
    random = Random(case.seed)
    sizes = (16, 32, 64) if max(prod(case.shape), prod(case.keys)) <= 48 else (32, 64)
    return dict(queries=random.choice(sizes), keys=random.choice(sizes), wide=random.random() < 0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_formula_matches_the_reference(kind):
    """With a mask of three intervals that skips tiles of 16, key heads that queries share, and without."""
    with configs.override(queries=16, keys=16):
        check(replace(FULL, kind=kind, length_scale=True), torch.float32, "triton")
        check(Case((19,), kind, heads=1, seed=1), torch.float32, "triton")


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_cases_match_the_reference(first):
    affordable_cases = list(islice(filter(affordable, cases(10**6, seed=1)), CASES))
    for case in affordable_cases[first : first + CHUNK]:
        with configs.override(**forced(case)):
            check(case, torch.float32, "triton")


@pytest.mark.parametrize(("kind", "mask"), list(product(KINDS, MASKS)))
def test_masks_skip_tiles(kind, mask):
    case = Case((40,), kind, heads=1, mask=mask, length_scale=True, seed=3)
    with configs.override(queries=16, keys=16):
        check(case, torch.float32, "triton")


def test_half_precision_keeps_the_error_rule():
    for case in islice(filter(affordable, cases(10**6, seed=2)), 12):
        check(case, torch.float16, "triton")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["cope", "parallax"])
def test_layouts_are_read_in_place(kind, layout):
    """Every layout gives the bits of a contiguous copy."""
    case = replace(FULL, kind=kind, layout=layout)
    inputs = make_inputs(case, torch.float32)
    packed = {n: x.detach().clone(memory_format=torch.contiguous_format) for n, x in inputs.items()}
    (out, lse), (same, same_lse) = (attend(**x, **case.options, impl="triton") for x in (inputs, packed))
    assert torch.equal(out, same) and torch.equal(lse, same_lse)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(128, 128), (64, 128), (128, 24)])
@pytest.mark.parametrize("kind", KINDS)
def test_head_dims_with_the_pinned_tiles(kind, head_dim, value_dim):
    check(Case((20,), kind, heads=1, head_dim=head_dim, value_dim=value_dim, scale=0.1), torch.float32, "triton")


@pytest.mark.parametrize("positions", [2, 40, 65])
def test_tables_of_cope(positions):
    """Positions that reach the end of a table and those that do not, with the pinned tiles."""
    check(Case((150,), "cope", heads=1, positions=positions), torch.float32, "triton")


def test_an_order_of_tokens():
    query, key, value = torch.randn(3, 1, 4, 5, 2, 8)
    order = torch.randperm(20)
    out, exact = (
        scored_attention(query, key, value, score=Softmax(), order=order, impl=impl) for impl in ("triton", "reference")
    )
    torch.testing.assert_close(out, exact)


def test_flops_are_counted():
    for kind, logits in (("softmax", 1), ("parallax", 2)):
        case = Case((35,), kind, key_shape=(24,), value_dim=12)
        with FlopCounterMode(display=False) as counter:
            found = attend(**make_inputs(case, torch.float32), **case.options, impl="triton")
            found[0].sum().backward()
        assert counter.get_total_flops() == 2 * 2 * 35 * 24 * (4 * logits * 8 + 3 * 12)


def test_long_heads_and_tables_are_refused():
    x = torch.zeros(1, 16, 1, 160)
    with pytest.raises(NotImplementedError, match="head_dim 160 exceeds 128"):
        scored_attention(x, x, x, score=Softmax(), impl="triton")
    case = Case((9,), "cope", positions=66)
    with pytest.raises(NotImplementedError, match="66 positions, more than 65"):
        attend(**make_inputs(case, torch.float32), **case.options, impl="triton")
