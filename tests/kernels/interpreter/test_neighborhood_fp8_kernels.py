"""The forward kernel with queries and keys in e4m3, run by Triton's interpreter on the CPU."""

from dataclasses import replace
from itertools import islice
from math import prod
from random import Random

import fp8_matrix
import pytest
import torch
from foveal.kernels.neighborhood import configs, make_axes, quantized
from foveal.kernels.neighborhood.call import NeighborhoodCall, neighborhood
from foveal.kernels.neighborhood.configs import Size
from foveal.kernels.ops import na2d
from neighborhood_matrix import Case, cases
from torch.utils.flop_counter import FlopCounterMode

QUICK = (  # by default; all others are slow
    "test_any_scale[0.0]",
    "test_zeros_and_tiny",
    "test_flops",
)
SIZES = [Size(queries, keys, 4, 1) for queries, keys in ((16, 16), (32, 16), (16, 32), (32, 32), (64, 64))]
FULL = Case(
    shape=(9, 11), window=(5, 3), stride=(2, 1), dilation=(1, 2), causal=(False, True),
    heads=4, key_heads=2, head_dim=24, bias=True, extra=3,
)  # fmt: skip


def affordable(case: Case) -> bool:
    """The interpreter takes about ten milliseconds a program: few tiles, few entries of the bias table."""
    entries = case.heads * prod(2 * w - 1 for w in case.window) if case.bias else 0
    return prod(case.dilation) * case.batch * case.heads <= 6 and case.batch * prod(case.shape) <= 80 and entries <= 30


def fp8_cases(rank: int, n: int) -> list[Case]:
    """Random cases of head dims that the kernel takes."""
    found = filter(affordable, cases(rank, 10**6, seed=8))
    return [replace(case, head_dim=Random(case.seed).choice((17, 24, 32, 40, 64))) for case in islice(found, n)]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_random_cases_match_the_reference_on_the_rounded_numbers(rank):
    for case in fp8_cases(rank, 12):
        random = Random(case.seed)
        launch = dict(size=random.choice(SIZES), descriptor=random.random() < 0.6, wide=random.random() < 0.3)
        with configs.override(**launch):
            fp8_matrix.check(case, torch.float16, "triton")


@pytest.mark.parametrize("scale", [-0.4, 0.0, 3.0])
def test_any_scale(scale):
    fp8_matrix.check(replace(FULL, scale=scale), torch.float16, "triton")


def test_pinned_tiles_are_right():
    fp8_matrix.check(FULL, torch.float16, "triton")
    fp8_matrix.check(replace(FULL, batch=2, key_heads=1, head_dim=32), torch.float16, "triton")


def test_zeros_and_tiny_numbers():
    """The factor of a product stays above zero, by which the mask of logits would be NaN."""
    query, key, value = torch.zeros(3, 1, 6, 7, 1, 32, dtype=torch.float16)
    for size in (0.0, 1e-7):
        out = na2d(
            query + size, key + size, value + 1, window=3, qk_dtype=torch.float8_e4m3fn, scale=1e-9, impl="triton"
        )
        assert torch.equal(out, value + 1)


def arguments() -> tuple:
    query, key, value = torch.randn(3, 2, 6, 7, 2, 24, dtype=torch.float16)
    extra = torch.randn(2, 2, 3, 2, 24, dtype=torch.float16)
    rounded = quantized.quantize(query, key, extra[0])
    factor, bias = rounded.query_scale * rounded.key_scale, torch.randn(2, 5, 5)
    axes = make_axes((6, 7), window=3, dilation=(1, 2), causal=(False, True))
    call = NeighborhoodCall(axes, 0.5, bias, rounded.additional_keys, extra[1])
    return rounded.query, rounded.key, value, factor, *neighborhood.codec.flatten(call)


def test_opcheck():
    utils = ("test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")  # no sums of e4m3 on CPU
    torch.library.opcheck(torch.ops.foveal.neighborhood_fp8_forward, arguments(), test_utils=utils)


def test_flops_are_those_of_half_precision():
    query, key, value = torch.randn(3, 2, 8, 10, 3, 32, dtype=torch.float16)
    totals = []
    for qk_dtype in (None, torch.float8_e4m3fn):
        with FlopCounterMode(display=False) as counter:
            na2d(query, key, value, window=(3, 5), qk_dtype=qk_dtype, impl="triton")
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == 2 * 2 * 2 * 3 * 32 * 80 * 15
