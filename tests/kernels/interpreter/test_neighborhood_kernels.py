"""The Triton kernels of neighborhood attention, run by Triton's interpreter on the CPU."""

from dataclasses import replace
from functools import cache
from itertools import islice
from math import prod
from random import Random

import pytest
import torch
import triton
import triton.language as tl
from foveal.kernels.neighborhood import configs, geometry, tile
from foveal.kernels.neighborhood import launch as neighborhood_launch
from foveal.kernels.neighborhood.configs import Size
from foveal.kernels.ops import na2d
from neighborhood_matrix import (
    OPERATORS,
    Case,
    cases,
    check,
    check_heads,
    check_masked_tokens,
    check_part,
    make_inputs,
    masked_cases,
    plain,
    run,
)
from operator_matrix import gradients
from torch.utils.flop_counter import FlopCounterMode

QUICK = (  # by default; all others are slow
    "test_random_cases_match_the_reference[1-0]",
    "test_random_cases_match_the_reference[2-0]",
    "test_random_cases_match_the_reference[3-0]",
    "test_head_dims_in_two_parts[72-160]",
    "test_windows_per_head[1]",
    "test_table_gradient[three axes-65536]",
    "test_a_frozen_table",
    "test_nan_in_a_key",
    "test_memory_around",
)
CASES, SLOW = 300, 90  # of random cases, and of those that are not exhaustive
CHUNK = 3
SIZES = [Size(queries, keys, 4, 1) for queries, keys in ((16, 16), (32, 16), (16, 32), (32, 32), (64, 32), (64, 64))]


FULL = Case(
    shape=(9, 11),
    window=(5, 3),
    stride=(2, 1),
    dilation=(1, 2),
    causal=(False, True),
    heads=2,
    key_heads=1,
    bias=True,
    extra=3,
)


MASKED = replace(FULL, extra=19, value_dim=5, additional_mask="mask")


def affordable(case: Case) -> bool:
    """The interpreter takes about ten milliseconds a program: few tiles."""
    slices = case.batch * case.heads * prod(case.dilation)
    return slices <= 6 and case.batch * case.heads * prod(case.shape) <= 240


@cache
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


@pytest.mark.parametrize(("head_dim", "value_dim"), [(72, 160), (96, 72), (160, 96), (80, 64)])
def test_head_dims_in_two_parts(head_dim, value_dim):
    """Keys, values and their gradients, with a bias and additional keys, by pointers and where descriptors address."""
    case = replace(FULL, head_dim=head_dim, value_dim=value_dim, extra=40)
    check(case, torch.float32, "triton")
    check(plain(case, head_dim), torch.float16, "triton")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_queries_that_are_a_part_of_the_grid(rank):
    for case in affordable_cases(rank, seed=3)[:8]:
        with configs.override(**forced(case)):
            check_part(case, torch.float32, "triton")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_windows_per_head(rank):
    case = next(case for case in affordable_cases(rank, seed=7) if case.batch and case.heads > 2)
    with configs.override(**forced(case)):
        check_heads(case, torch.float32, "triton")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_masked_extra_keys_go_nowhere(rank):
    case = next(filter(affordable, masked_cases(rank, 10**6, seed=10)))
    with configs.override(**forced(case)):
        check_masked_tokens(case, torch.float32, "triton")


@pytest.mark.parametrize("widths", [(16, 70), (64, 3)])
def test_values_wider_and_narrower_than_keys(widths):
    case = Case((6, 7), (3, 5), (1, 2), (1, 1), (False, False), heads=1, key_heads=1, head_dim=widths[0], extra=2)
    case = replace(case, value_dim=widths[1], bias=True)
    check(case, torch.float16, "triton")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_half_precision_keeps_the_error_rule(rank):
    for case in affordable_cases(rank, seed=2)[:8]:
        check(case, torch.float16, "triton")


@pytest.mark.parametrize("scale", [-0.4, 0.0, 3.0])
def test_any_scale(scale):
    check(replace(FULL, scale=scale), torch.float32, "triton")


TABLES = {
    "rows longer than are summed at a time": Case((90,), (77,), (4,), (1,), (False,), batch=2),
    "dilation groups of several lengths": Case((11, 13), (3, 5), (1, 2), (3, 2), (False, True), key_heads=1, extra=3),
    "three axes": Case((3, 4, 6), (3, 3, 3), (1, 2, 1), (1, 1, 2), (True, False, False)),
}


@pytest.mark.parametrize("memory", [2**27, 2**16, 1])
@pytest.mark.parametrize("name", TABLES)
def test_table_gradient(name, memory, monkeypatch):
    """In one launch, in several of some heads each, and one program at a time."""
    monkeypatch.setattr(neighborhood_launch, "PAIR_BYTES", memory)
    check(replace(TABLES[name], bias=True), torch.float32, "triton")


def test_a_frozen_table_costs_nothing_and_changes_nothing(monkeypatch):
    expected, inputs = run(FULL, make_inputs(FULL, torch.float32), "triton"), make_inputs(FULL, torch.float32)
    bias = inputs.pop("bias").detach()
    monkeypatch.setattr(neighborhood_launch, "table_gradient", None)
    found = gradients(inputs, *OPERATORS[2](**inputs, bias=bias, **FULL.options, impl="triton"), FULL.seed + 1)
    assert found.keys() == expected.keys() - {"bias"}
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_pinned_tiles_are_right():
    """The launches that users get: no override."""
    for case in (
        FULL,
        Case(shape=(2, 6, 11), window=(2, 5, 4), stride=(1, 5, 1), dilation=(1, 1, 2), causal=(False,) * 3),
    ):
        check(case, torch.float32, "triton")


@triton.jit
def note_first_rows(out_ptr, lengths, TILE: tl.constexpr, DILATION: tl.constexpr, BACKWARD: tl.constexpr):
    pid = tl.program_id(0)
    _, _, _, _, first = tile.program(pid, lengths, 1, TILE, DILATION, BACKWARD)
    for axis in tl.static_range(3):
        tl.store(out_ptr + 3 * pid + axis, first[axis])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("causal", [(True, False), (False, True), (True, True)])
def test_programs_that_take_longest_begin_first(causal, inverse):
    """Along causal axes: queries walk from the end, keys from the beginning. Windows span the other axes."""
    lengths, rows = (23, 30), (4, 8)
    counts = tuple(-(-n // r) for n, r in zip(lengths, rows, strict=True))
    first = torch.full((prod(counts), 3), -1, dtype=torch.int32)
    backward = (False,) * 3 if inverse else (False, *causal)
    note_first_rows[(prod(counts),)](first, (1, *lengths), TILE=(1, *rows), DILATION=(1,) * 3, BACKWARD=backward)
    assert len({tuple(row) for row in first.tolist()}) == prod(counts), "every tile once"

    rule = geometry.inverse_bounds if inverse else geometry.window_bounds
    seen = torch.empty(prod(counts), 2, dtype=torch.int32)  # columns that a tile touches, by axis
    for program, row in enumerate(first[:, 1:].tolist()):
        for axis, (n, r) in enumerate(zip(lengths, rows, strict=True)):
            low, _ = rule(row[axis], n, n, 1, causal[axis])
            _, high = rule(min(row[axis] + r, n) - 1, n, n, 1, causal[axis])
            seen[program, axis] = high - low
    seen = seen.view(*counts, 2)
    assert (seen[1:, :, 0] <= seen[:-1, :, 0]).all() and (seen[:, 1:, 1] <= seen[:, :-1, 1]).all()
    assert (bool(seen[0, 0, 0] > seen[-1, 0, 0]), bool(seen[0, 0, 1] > seen[0, -1, 1])) == causal


def test_each_batch_entry_is_computed_alone():
    case = replace(FULL, batch=3)
    inputs = make_inputs(case, torch.float32)
    whole = run(case, inputs, "triton")["out"]
    for b in range(3):
        one = {n: x if n == "bias" else x[b : b + 1].detach().requires_grad_() for n, x in inputs.items()}
        assert torch.equal(run(replace(case, batch=1), one, "triton")["out"], whole[b : b + 1])


@pytest.mark.parametrize("descriptor", [False, True])
def test_nan_in_a_key_stays_in_its_neighborhood(descriptor):
    query, key, value = torch.randn(3, 1, 12, 12, 1, 8)
    key[0, 5, 7] = float("nan")
    with configs.override(size=Size(16, 16, 4, 1), descriptor=descriptor):
        out = na2d(query, key, value, window=3, impl="triton")
    sees = out.isnan().all(-1)[0, :, :, 0]
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[4:7, 6:9] = True
    assert torch.equal(sees, expected)
    assert torch.equal(out.isnan().any(-1)[0, :, :, 0], expected)


def test_memory_around_the_tensors_is_not_read():
    """Slices of a buffer full of NaN give what copies of them give, to the bit."""
    buffer = torch.full((3, 2, 11, 13, 4, 12), float("nan"))
    inside = buffer[:, :1, 1:10, 1:12, 1:3, :8]
    inside.copy_(torch.randn(inside.shape, generator=torch.Generator().manual_seed(0)))
    for descriptor in (False, True):
        with configs.override(size=Size(32, 32, 4, 1), descriptor=descriptor):
            out = na2d(*inside, window=(5, 7), stride=(2, 3), impl="triton")
            assert torch.equal(out, na2d(*inside.contiguous(), window=(5, 7), stride=(2, 3), impl="triton"))
            assert out.isfinite().all()


def test_flops_are_counted():
    query, key, value = (x.requires_grad_() for x in torch.randn(3, 2, 8, 10, 3, 16))
    extra = torch.randn(2, 4, 3, 16)
    with FlopCounterMode(display=False) as counter:
        na2d(
            query, key, value, window=(3, 5), additional_keys=extra, additional_values=extra, impl="triton"
        ).sum().backward()
    products = 2 * 2 * 3 * 16 * 80 * (15 + 4)  # two FLOPs, batch, heads, head_dim, queries, keys a query sees
    assert counter.get_total_flops() == (2 + 5) * products
