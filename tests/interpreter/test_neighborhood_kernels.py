"""The Triton kernels of neighborhood attention, run by Triton's interpreter on the CPU."""

from itertools import islice
from math import prod
from random import Random

import pytest
import torch
from foveal.kernels.neighborhood import configs
from foveal.kernels.neighborhood.configs import Size
from neighborhood_matrix import Case, cases, check

CASES = 300
CHUNK = 50
SIZES = (Size(16, 16, 4, 1), Size(32, 16, 4, 2), Size(16, 32, 4, 2), Size(32, 32, 4, 2), Size(64, 32, 4, 2), Size(64, 64, 4, 2))


def affordable(case: Case) -> bool:
    """The interpreter takes about ten milliseconds a program: few tiles, few entries of the bias table."""
    slices = case.batch * case.heads * prod(case.dilation)
    entries = case.heads * prod(2 * w - 1 for w in case.window) if case.bias else 0
    return slices <= 12 and case.batch * case.heads * prod(case.shape) <= 400 and entries <= 60


def affordable_cases(rank: int, seed: int) -> list[Case]:
    return list(islice(filter(affordable, cases(rank, 10**6, seed)), CASES))


def forced(case: Case) -> dict:
    """A launch that this case alone would not take: any tile size, with or without descriptors, 64-bit offsets."""
    random = Random(case.seed)
    sizes = SIZES if case.batch * case.heads * prod(case.shape) <= 100 else SIZES[3:]
    return dict(size=random.choice(sizes), descriptor=random.random() < 0.6, wide=random.random() < 0.3)


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_random_cases_match_the_reference(rank, first):
    for case in affordable_cases(rank, seed=1)[first : first + CHUNK]:
        with configs.override(**forced(case)):
            check(case, torch.float32, "triton")
