"""The window rule: against its definition, its own inverse, and masks recorded from NATTEN 0.21.7."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from foveal.kernels.neighborhood import Axis, geometry

GOLDENS = Path(__file__).parents[1] / "goldens"
RECORDED = json.loads((GOLDENS / "neighborhood.json").read_text())["configs"]


def every_group(longest: int):
    """All (n, window, stride, causal) with n up to `longest`."""
    for n in range(1, longest + 1):
        for window in range(1, n + 1):
            for stride in range(1, window + 1):
                for causal in (False, True):
                    yield n, window, stride, causal


def by_definition(p: int, n: int, window: int, stride: int, causal: bool) -> range:
    """Keys of one query as arXiv:2504.16922 puts it: stride groups with a leader, windows that shift at borders."""
    members = [q for q in range(n) if q // stride == p // stride]
    leader = members[-1] if causal else members[min(stride // 2, len(members) - 1)]
    if causal:
        return range(max(leader - window + 1, 0), p + 1)
    first = leader - window // 2
    while first < 0:
        first += 1
    while first + window > n:
        first -= 1
    return range(first, first + window)


def test_bounds_follow_the_definition():
    for n, window, stride, causal in every_group(16):
        for p in range(n):
            assert range(*geometry.window_bounds(p, n, window, stride, causal)) == by_definition(
                p, n, window, stride, causal
            ), (p, n, window, stride, causal)


def test_tensors_and_integers_agree():
    for n, window, stride, causal in every_group(12):
        lo, hi = geometry.window_bounds(torch.arange(n), n, window, stride, causal)
        assert list(zip(lo.tolist(), hi.tolist(), strict=True)) == [
            geometry.window_bounds(p, n, window, stride, causal) for p in range(n)
        ]


def test_inverse_is_exact_and_bounds_are_monotone():
    for n, window, stride, causal in every_group(30):
        p = torch.arange(n)
        lo, hi = geometry.window_bounds(p, n, window, stride, causal)
        first, last = geometry.inverse_bounds(p, n, window, stride, causal)
        sees = (p >= lo[:, None]) & (p < hi[:, None])  # [query, key]
        seen = (p[:, None] >= first) & (p[:, None] < last)
        case = (n, window, stride, causal)
        assert torch.equal(sees, seen), case
        assert sees.any(0).all() and sees.any(1).all(), case
        assert all(bool((x.diff() >= 0).all()) for x in (lo, hi, first, last)), case


@pytest.mark.parametrize("causal", [False, True])
def test_dilation_groups_are_problems_of_their_own(causal):
    for length, window, stride, dilation in [(17, 3, 2, 5), (20, 4, 1, 3), (9, 3, 3, 3), (8, 1, 1, 7), (31, 5, 4, 6)]:
        visible = geometry.axis_mask(Axis(length, window, stride, dilation, causal))
        expected = torch.zeros(length, length, dtype=torch.bool)
        for g in range(dilation):
            n = len(range(g, length, dilation))
            expected[g::dilation, g::dilation] = geometry.axis_mask(Axis(n, window, stride, 1, causal))
        assert torch.equal(visible, expected)


@pytest.mark.parametrize("config", RECORDED, ids=lambda c: f"{c['id']}-{c['tag']}")
def test_mask_recorded_from_natten(config):
    values = zip(*(config[x] for x in ("shape", "window", "stride", "dilation", "is_causal")), strict=True)
    axes = tuple(Axis(*v) for v in values)
    with np.load(GOLDENS / "neighborhood.npz") as recorded:
        packed = recorded[config["mask_key"]]
    tokens = config["tokens"]
    expected = np.unpackbits(packed, count=tokens * tokens, bitorder="little").reshape(tokens, tokens).astype(bool)
    got = geometry.mask(axes)
    assert torch.equal(got, torch.from_numpy(expected))
    assert int(got.sum()) == config["nnz"] == geometry.visible_pairs(axes)


def test_relative_index_counts_from_the_query_in_dilation_units():
    axes = (Axis(9, 3, 1, 2), Axis(7, 5))
    index, visible = geometry.relative_index(axes), geometry.mask(axes)
    for query in range(63):
        for key in visible[query].nonzero().flatten().tolist():
            rows, columns = (key // 7 - query // 7) // 2 + 2, key % 7 - query % 7 + 4
            assert index[query, key] == rows * 9 + columns
    assert (index[~visible] == 0).all()


def test_key_counts_of_a_window_that_is_not_causal_are_the_window():
    for length, window, stride, dilation in [(12, 5, 2, 2), (7, 7, 3, 1), (16, 4, 4, 1), (23, 6, 5, 3)]:
        assert (geometry.key_counts(Axis(length, window, stride, dilation)) == window).all()
