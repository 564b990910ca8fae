"""The Triton kernels of window attention, run by Triton's interpreter on the CPU."""

from dataclasses import replace
from itertools import islice
from math import prod
from random import Random

import pytest
import torch
from foveal.kernels.ops import window_attention
from foveal.kernels.window import configs
from torch.utils.flop_counter import FlopCounterMode
from window_matrix import Case, cases, check

QUICK = (  # by default; all others are slow
    "test_random_cases_match_the_reference[1-0]",
    "test_random_cases_match_the_reference[2-0]",
    "test_random_cases_match_the_reference[3-0]",
    "test_nan_in_a_key",
    "test_flops",
)
CASES = 60
CHUNK = 2
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


def test_nan_in_a_key_stays_in_its_window():
    query, key, value = torch.randn(3, 1, 8, 8, 1, 8)
    key[0, 5, 6] = float("nan")
    out = window_attention(query, key, value, window=2, impl="triton")  # all windows share a tile
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[4:6, 6:8] = True
    assert torch.equal(out.isnan().all(-1)[0, :, :, 0], expected)
    assert torch.equal(out.isnan().any(-1)[0, :, :, 0], expected)


def test_flops_are_counted():
    query, key, value = (x.requires_grad_() for x in torch.randn(3, 2, 8, 12, 3, 16))
    with FlopCounterMode(display=False) as counter:
        window_attention(query, key, value, window=(4, 3), impl="triton").sum().backward()
    products = 2 * 2 * 3 * 16 * 96 * 12  # two FLOPs, batch, heads, head_dim, queries, keys a query sees
    assert counter.get_total_flops() == (2 + 5) * products
