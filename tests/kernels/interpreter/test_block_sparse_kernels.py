"""The Triton kernels of block-sparse attention, run by Triton's interpreter on the CPU."""

from dataclasses import replace
from itertools import islice
from math import prod
from random import Random

import pytest
import torch
from block_sparse_matrix import TENSORS, Case, cases, check, make_inputs, make_mask, run, threshold
from foveal.kernels.block_sparse import configs, inverse
from foveal.kernels.block_sparse.configs import Size
from foveal.kernels.block_sparse.mask import box_of_token, invert, listed
from foveal.kernels.common.launching import MIN_TILE
from foveal.kernels.ops import block_sparse_attention, routing_attention2d
from torch.utils.flop_counter import FlopCounterMode

QUICK = (  # by default; all others are slow
    "test_random_cases_match_the_reference[0]",
    "test_whole_boxes_match_the_reference[0]",
    "test_skipping_matches_the_reference[0]",
    "test_inverse_lists",
    "test_head_dims_of_keys_and_values_may_differ[72-160]",
    "test_empty_lists",
    "test_what_is_not_listed",
    "test_flops",
)
CASES, SLOW = 160, 60  # of random cases, and of those that are not exhaustive
CHUNK = 2
SIZES = [Size(rows, columns, 4, 1) for rows, columns in ((16, 16), (32, 16), (16, 32), (32, 32), (64, 32), (64, 64))]


def affordable(case: Case) -> bool:
    """The interpreter takes about ten milliseconds a program: few boxes."""
    return case.batch * case.heads * (case.query_boxes + case.key_boxes) <= 40 and prod(case.shape) <= 100


def affordable_cases(seed: int) -> list[Case]:
    return list(islice(filter(affordable, cases(10**6, seed)), CASES))


def forced(case: Case) -> dict:
    """A launch that this case alone would not take: any tile size, 64-bit offsets."""
    random = Random(case.seed)
    return dict(size=random.choice(SIZES), wide=random.random() < 0.3)


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_cases_match_the_reference(first):
    for case in affordable_cases(seed=1)[first : first + CHUNK]:
        with configs.override(**forced(case)):
            check(case, torch.float32, "triton")


def powers_of_two(case: Case) -> Case:
    """The case with boxes and a scale that allow an iteration to load whole boxes."""
    sides = [tuple(1 << (n.bit_length() - 1) for n in block) for block in (case.query_block, case.key_block)]
    scale = abs(case.scale) or None if case.scale else None
    case = replace(case, query_block=sides[0], key_block=sides[1], scale=scale, q_len=False, kv_len=False)
    return replace(case, most=min(case.most, case.key_boxes))


@pytest.mark.parametrize("first", range(0, CASES // 2, 2))
def test_whole_boxes_match_the_reference(first):
    """Boxes or parts of them by descriptors and by pointers, in grids that they divide or not."""
    found = filter(affordable, map(powers_of_two, cases(10**6, seed=3)))
    found = (case for case in found if min(prod(case.query_block), prod(case.key_block)) >= MIN_TILE)
    for case in islice(found, first, first + 2):
        with configs.override(**forced(case), whole=True, descriptor=case.seed % 2 == 0):
            check(case, torch.float32, "triton")


@pytest.mark.parametrize("first", range(32))
def test_skipping_matches_the_reference(first):
    found = (replace(case, skip=True, scale=1.0) for case in cases(10**6, seed=4))
    found = (powers_of_two(case) if case.seed % 2 else case for case in found if case.batch and case.most > 1)
    found = (case for case in found if affordable(case) and threshold(case))
    for case in islice(found, first, first + 1):
        with configs.override(whole=not (case.q_len or case.kv_len), descriptor=case.seed % 3 == 0):
            check(case, torch.float32, "triton")


def test_big_boxes_keep_the_error_rule():
    """The launches that users get: boxes of 64 and 128 tokens in half precision, whole and cut."""
    even = Case((8, 8, 8), (8, 4, 8), (4, 4, 8), (4, 4, 4), most=2, heads=2, key_heads=1, head_dim=64)
    for case in (even, replace(even, shape=(5, 7, 9), bias=True, extra=2), replace(even, key_block=(4, 4, 8), most=1)):
        check(case, torch.float16, "triton")


def test_inverse_lists_are_those_of_a_sort(monkeypatch):
    monkeypatch.setattr(inverse, "CHUNKS", 3)
    for lead, query_boxes, key_boxes, most in (((1, 1), 5, 7, 3), ((1, 2), 10, 9, 9), ((2, 1), 2, 1, 1)):
        kv_num = torch.randint(0, most + 1, (*lead, query_boxes), dtype=torch.int32)
        kv_idx = torch.rand(*lead, query_boxes, key_boxes).argsort(-1)[..., :most].int()
        kv_idx = torch.where(listed(kv_num, kv_idx), kv_idx, -(10**6))
        (starts, order), (expected, entries) = (f(kv_num, kv_idx, key_boxes) for f in (inverse.invert, invert))
        assert torch.equal(starts, expected)
        counts = torch.arange(order.shape[-1]) < starts[..., -1:]
        assert torch.equal(order[counts], entries[counts])


def test_half_precision_keeps_the_error_rule():
    for case in affordable_cases(seed=2)[:12]:
        check(case, torch.float16, "triton")


FULL = Case(
    shape=(7, 10),
    key_shape=(5, 9),
    query_block=(4, 5),
    key_block=(3, 5),
    most=3,
    bias=True,
    kv_len=True,
    heads=2,
    key_heads=1,
    extra=3,
)


def test_pinned_tiles_are_right():
    """The launches that users get: no override; boxes of a whole tile, and long ones."""
    whole = Case(shape=(16, 16), key_shape=(16, 16), query_block=(8, 8), key_block=(8, 8), most=3, heads=1, key_heads=1)
    long = Case(shape=(150,), key_shape=(150,), query_block=(75,), key_block=(50,), most=2, heads=1, key_heads=1)
    for case in (FULL, whole, long, replace(whole, bias=True, kv_len=True, q_len=True)):
        check(case, torch.float32, "triton")


@pytest.mark.parametrize("head_dim, value_dim", [(64, 256), (256, 64), (1, 40), (72, 160), (96, 72), (160, 80)])
def test_head_dims_of_keys_and_values_may_differ(head_dim, value_dim):
    check(replace(FULL, head_dim=head_dim, value_dim=value_dim), torch.float32, "triton")


def test_empty_lists():
    inputs = make_inputs(replace(FULL, extra=0), torch.float32)
    mask = make_mask(FULL)._replace(kv_num=torch.zeros(1, 1, FULL.query_boxes, dtype=torch.int32))
    out, lse = block_sparse_attention(**inputs, mask=mask, impl="triton", return_lse=True)
    assert (out == 0).all() and (lse == float("-inf")).all()
    inputs = [inputs[n] for n in TENSORS[:3]]
    assert all(
        (g == 0).all() for g in torch.autograd.grad((out, lse), inputs, (out.detach() + 1, lse.detach() * 0 + 1))
    )


def test_what_is_not_listed_is_not_read():
    """NaN outside the listed boxes, past the ends of ragged boxes and in queries that do not exist reaches nothing."""
    case = replace(FULL, q_len=True)
    mask, inputs = make_mask(case), make_inputs(case, torch.float32)
    mask = mask._replace(kv_num=mask.kv_num.clamp(max=1), kv_idx=mask.kv_idx.clamp(min=0) % 2)
    clean = run(case, inputs, "triton", mask=mask)
    poisoned = {n: x.detach().clone() for n, x in inputs.items()}
    box, place = box_of_token(case.key_shape, case.key_block, torch.device("cpu"))
    dead = ((box >= 2) | (place >= mask.kv_len[box])).view(case.key_shape)
    box, place = box_of_token(case.shape, case.query_block, torch.device("cpu"))
    absent = (place >= mask.q_len[box]).view(case.shape)
    assert dead.any() and absent.any()
    poisoned["key"][:, dead] = poisoned["value"][:, dead] = poisoned["query"][:, absent] = float("nan")
    dirty = run(case, {n: x.requires_grad_() for n, x in poisoned.items()}, "triton", mask=mask)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


def test_compiled_and_exported_as_one_operator():
    torch._dynamo.reset()
    query, key, value = torch.randn(3, 1, 14, 14, 2, 8)
    compiled = torch.compile(routing_attention2d, fullgraph=True, backend="aot_eager")
    found = compiled(query, key, value, topk=3, impl="triton")
    torch.testing.assert_close(found, routing_attention2d(query, key, value, topk=3, impl="reference"))

    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return routing_attention2d(query, key, value, topk=3, impl="triton")

    program = torch.export.export(Model(), (query, key, value))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "foveal.block_sparse_forward.default" in targets


def test_flops_are_counted_as_if_lists_were_full():
    case = replace(FULL, key_heads=2)
    inputs = make_inputs(case, torch.float32)
    with FlopCounterMode(display=False) as counter:
        out = block_sparse_attention(**inputs, mask=make_mask(case), impl="triton")
        out.sum().backward()
    pairs = 2 * 4 * 20 * (3 * 15 + 3)  # heads, query boxes, their tokens, listed and extra keys
    assert counter.get_total_flops() == (4 + 10) * 8 * pairs
