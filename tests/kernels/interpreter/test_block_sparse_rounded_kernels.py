"""The Triton forward of block-sparse attention on 8-bit queries and keys, run by Triton's interpreter on the CPU."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from math import prod
from random import Random

import pytest
import torch
from block_sparse_matrix import Case, cases
from block_sparse_rounded_matrix import DTYPES, FULL, check
from foveal.kernels.block_sparse import configs, eight_bit
from foveal.kernels.block_sparse.call import RoundedCall, block_sparse, make_call
from foveal.kernels.block_sparse.configs import Size
from foveal.kernels.common.launching import MIN_TILE
from foveal.kernels.ops import BlockMask, block_sparse_attention
from torch.utils.flop_counter import FlopCounterMode

QUICK = (  # by default; all others are slow
    "test_random_cases_match_the_reference_on_the_rounded_numbers[int8-0]",
    "test_whole_boxes_match_the_reference_on_the_rounded_numbers[e4m3-0]",
    "test_all_options[int8",
    "test_opcheck",
    "test_flops",
)
CASES = 24
CHUNK = 2
SIZES = [Size(rows, columns, 4, 1) for rows, columns in ((16, 32), (32, 32), (64, 32), (64, 64))]
EIGHT_BITS = {name: dtype for name, dtype in DTYPES.items() if name != "signs"}
of_both = pytest.mark.parametrize("qk_dtype", EIGHT_BITS.values(), ids=EIGHT_BITS.keys())


def eight_bit_cases(seed: int) -> Iterator[Case]:
    """Random cases of head dims that the kernel takes, small enough for the interpreter."""
    for case in cases(10**6, seed):
        boxes = case.batch * case.heads * (case.query_boxes + case.key_boxes)
        if boxes <= 40 and prod(case.shape) <= 100 and case.batch:
            scale = None if case.scale is None else abs(case.scale) or None
            yield replace(case, head_dim=Random(case.seed).choice((17, 24, 32, 40, 64)), scale=scale, skip=False)


def launched(monkeypatch) -> list[int]:
    """Gets a number for every launch of eight bits from here on."""
    attend, count = eight_bit.attend, []
    monkeypatch.setattr(eight_bit, "attend", lambda *given: count.append(1) or attend(*given))
    return count


@of_both
@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_cases_match_the_reference_on_the_rounded_numbers(first, qk_dtype, monkeypatch):
    count = launched(monkeypatch)
    for case in islice(eight_bit_cases(seed=6), first, first + CHUNK):
        random = Random(case.seed)
        with configs.override(size=random.choice(SIZES), wide=random.random() < 0.3):
            check(case, torch.float16, "triton", qk_dtype)
    assert len(count) == CHUNK


@of_both
@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_whole_boxes_match_the_reference_on_the_rounded_numbers(first, qk_dtype, monkeypatch):
    """Boxes or parts of them by descriptors and by pointers, in grids that they divide or not."""
    count = launched(monkeypatch)

    def whole() -> Iterator[Case]:
        for case in eight_bit_cases(seed=7):
            sides = [tuple(1 << (n.bit_length() - 1) for n in block) for block in (case.query_block, case.key_block)]
            case = replace(case, query_block=sides[0], key_block=sides[1], q_len=False, kv_len=False)
            if min(map(prod, sides)) >= 2 * MIN_TILE:
                yield replace(case, most=min(case.most, case.key_boxes))

    for case in islice(whole(), first, first + CHUNK):
        with configs.override(whole=True, descriptor=case.seed % 2 == 0, size=SIZES[case.seed % len(SIZES)]):
            check(case, torch.float16, "triton", qk_dtype)
    assert len(count) == CHUNK


@of_both
def test_all_options_at_once(qk_dtype, monkeypatch):
    count = launched(monkeypatch)
    check(FULL, torch.float16, "triton", qk_dtype)
    check(replace(FULL, value_dim=40, key_heads=1, additional_mask="none"), torch.float16, "triton", qk_dtype)
    assert len(count) == 2


@of_both
def test_skipping_leaves_out_what_the_reference_leaves_out(qk_dtype):
    """Weights of what is left out are far below those that stay, whatever is rounded."""
    query, key, value = torch.randn(3, 1, 8, 8, 2, 32, generator=torch.Generator().manual_seed(0)).half()
    key[:, :4] += 20 * query.mean((1, 2), keepdim=True)
    lists = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4).contiguous()
    mask = BlockMask((4, 4), (4, 4), torch.full((1, 1, 4), 4, dtype=torch.int32), lists)
    outs = []
    for impl in ("triton", "reference"):
        given = dict(mask=mask, qk_dtype=qk_dtype, skip_threshold=0.01, impl=impl)
        outs.append(block_sparse_attention(query, key, value, **given))
    torch.testing.assert_close(*outs, rtol=2e-3, atol=2e-3)


def test_a_block_with_nan_is_nan_where_it_is_seen_and_nowhere_else():
    query, key, value = torch.randn(3, 1, 6, 8, 2, 32, generator=torch.Generator().manual_seed(0)).half()
    lists = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]], dtype=torch.int32)[None, None]
    mask = BlockMask((3, 4), (3, 4), torch.full((1, 1, 4), 2, dtype=torch.int32), lists)
    key[0, 0, 5, 0, 3] = float("nan")  # in block 1, which blocks 0 and 1 see
    out = block_sparse_attention(query, key, value, mask=mask, qk_dtype=torch.int8, impl="triton")
    nan = out[0, :, :, 0].isnan().all(-1)
    assert nan[:3].all() and not nan[3:].any() and not out[0, :, :, 1].isnan().any()


def test_gradients_take_restored_numbers(monkeypatch):
    count = launched(monkeypatch)
    query, key, value = torch.randn(3, 1, 6, 8, 2, 32, generator=torch.Generator().manual_seed(0)).half()
    lists = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]], dtype=torch.int32)[None, None]
    mask = BlockMask((3, 4), (3, 4), torch.full((1, 1, 4), 2, dtype=torch.int32), lists)
    out = block_sparse_attention(query.requires_grad_(), key, value, mask=mask, qk_dtype=torch.int8, impl="triton")
    out.sum().backward()
    assert not count and query.grad is not None and query.grad.abs().sum() > 0


def arguments() -> tuple:
    query, key, value = torch.randn(3, 2, 6, 8, 2, 24, dtype=torch.float16)
    extra = torch.randn(2, 2, 3, 2, 24, dtype=torch.float16)
    lists = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]], dtype=torch.int32)[None, None]
    mask = BlockMask((3, 4), (3, 4), torch.full((1, 1, 4), 2, dtype=torch.int32), lists)
    given = dict(mask=mask, additional_keys=extra[0], additional_values=extra[1], qk_dtype=torch.int8)
    call = make_call(query, key, value, **given)
    assert isinstance(call, RoundedCall)
    found = eight_bit.to_int8(query, key, call)
    call = replace(call, additional_keys=found.additional_keys)
    scales = found.query_scale, found.key_scale, found.additional_scale
    return found.query, found.key, value, *scales, *block_sparse.codec.flatten(call)


def test_opcheck():
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    torch.library.opcheck(torch.ops.foveal.block_sparse_eight_bit_forward, arguments(), test_utils=utils)


def test_flops_are_those_of_half_precision():
    query, key, value = torch.randn(3, 1, 6, 8, 2, 32, dtype=torch.float16)
    lists = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]], dtype=torch.int32)[None, None]
    mask = BlockMask((3, 4), (3, 4), torch.full((1, 1, 4), 2, dtype=torch.int32), lists)
    totals = []
    for qk_dtype in (None, torch.int8):
        with FlopCounterMode(display=False) as counter:
            block_sparse_attention(query, key, value, mask=mask, qk_dtype=qk_dtype, impl="triton")
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == 4 * 32 * 2 * 48 * 24
