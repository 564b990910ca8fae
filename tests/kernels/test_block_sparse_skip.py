"""`skip_threshold`: skip softmax over block lists, without Triton."""

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from block_sparse_matrix import Case, cases, check, make_inputs, make_mask, threshold
from foveal.kernels.ops import BlockMask, SkipCalibration, block_sparse_attention, calibrate_skip, skipped_blocks

CASE = Case((6, 10), (6, 8), (3, 4), (2, 4), 5, per_head=True, bias=True, q_len=True, extra=3, skip=True, scale=1.0)


def full_lists(blocks: int, size: int) -> BlockMask:
    kv_idx = torch.arange(blocks, dtype=torch.int32).expand(1, 1, blocks, blocks)
    return BlockMask((size,), (size,), torch.full((1, 1, blocks), blocks, dtype=torch.int32), kv_idx)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_random_cases_match_the_reference(dtype):
    found = (replace(case, skip=True, scale=1.0) for case in cases(10**6, seed=9) if case.batch and case.most > 1)
    checked = list(islice(filter(threshold, found), 25))
    for case in checked:
        check(case, dtype, "torch")
    assert any(case.q_len for case in checked) and any(case.kv_len for case in checked)


def test_chunks_and_parts_change_nothing(monkeypatch):
    from foveal.kernels.block_sparse import tiled

    for name, value in (("LOGIT_BYTES", 512), ("CHUNK_BYTES", (1, 4096)), ("PART_BYTES", 1), ("PART_RATIO", 1e-3)):
        monkeypatch.setattr(tiled, name, value)
    assert threshold(CASE)
    check(CASE, torch.float64, "torch")


def test_what_is_skipped_on_logits_written_down():
    """Two queries of a block: a block of keys counts as soon as one of them needs it."""
    logits = torch.tensor([[4.0, 4.5, 0.0, 1.0, -2.0, -3.0, 5.0, 0.0], [0.0, 0.0, -9.0, -9.0, -1.0, -9.0, -9.0, -9.0]])
    query, key = torch.eye(2)[None, :, None], logits.T[None, :, None]  # logits are query @ key
    kv_idx = torch.arange(4, dtype=torch.int32).view(1, 1, 1, 4)
    mask = BlockMask((2,), (2,), torch.tensor([[[4]]], dtype=torch.int32), kv_idx)
    options = dict(mask=mask, scale=1.0)
    # largest so far: 4.5 and 0. Block 1 is 3.5 and 9 below, block 2 6.5 and 1 below, block 3 above for the first query
    for share, expected in (
        (math.exp(-3.6), [0, 0, 0, 0]),
        (math.exp(-3.4), [0, 1, 0, 0]),
        (math.exp(-0.9), [0, 1, 1, 0]),
    ):
        assert skipped_blocks(query, key, **options, skip_threshold=share).flatten().tolist() == expected
        value = torch.randn(1, 8, 1, 3)
        kept = torch.tensor(expected).repeat_interleave(2) == 0
        weights = logits.masked_fill(~kept, -math.inf).softmax(-1)
        for impl in ("torch", "reference"):
            out = block_sparse_attention(query, key, value, **options, skip_threshold=share, impl=impl)
            torch.testing.assert_close(out[0, :, 0], weights @ value[0, :, 0])


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_nothing_is_skipped_without_a_threshold(impl):
    inputs, mask = make_inputs(CASE, torch.float32), make_mask(CASE)
    plain = block_sparse_attention(**inputs, mask=mask, impl=impl)
    assert torch.equal(block_sparse_attention(**inputs, mask=mask, skip_threshold=0, impl=impl), plain)
    small = block_sparse_attention(**inputs, mask=mask, skip_threshold=1e-30, impl=impl)
    torch.testing.assert_close(small, plain, rtol=1e-6, atol=1e-6)


def test_dropped_weight_is_bounded():
    """A skipped token has at most `skip_threshold` times the largest weight."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 256, 2, 16, dtype=torch.float64)
    key *= torch.linspace(2, 0.1, 256)[:, None, None]
    kv_idx = torch.arange(16, dtype=torch.int32).expand(1, 1, 64, 16)
    mask = BlockMask((4,), (16,), torch.full((1, 1, 64), 16, dtype=torch.int32), kv_idx)
    skipped = skipped_blocks(query, key, mask=mask, skip_threshold=0.2)
    assert 0.05 < skipped.double().mean() < 0.9 and not skipped[..., 0].any()
    options = dict(mask=mask, return_lse=True)
    _, lse = block_sparse_attention(query, key, value, **options)
    _, less = block_sparse_attention(query, key, value, **options, skip_threshold=0.2)
    largest = torch.einsum("bqhd,bkhd->bqhk", query, key).amax(-1) / 4
    dropped = (lse.exp() - less.exp()) / largest.exp()
    tokens = 16 * skipped.sum(-1).repeat_interleave(4, 2).transpose(1, 2)
    assert (dropped <= 0.2 * tokens + 1e-12).all() and dropped.max() > 0


def test_not_a_number_is_not_skipped():
    query, key, value = torch.randn(3, 1, 64, 1, 8)
    key[:, 32:] *= 1e-3
    key[:, 40] = torch.nan
    out = block_sparse_attention(query * 9, key, value, mask=full_lists(4, 16), skip_threshold=0.9)
    assert out.isnan().any()


def test_calibration_meets_its_sparsity():
    torch.manual_seed(1)
    query, key = torch.randn(2, 1, 512, 2, 32) * 1.5
    key *= torch.linspace(1.2, 0.3, 512)[:, None, None]
    mask = full_lists(32, 16)
    found = calibrate_skip(query, key, mask=mask)
    for sparsity in (0.2, 0.4, 0.6):
        skipped = skipped_blocks(query, key, mask=mask, skip_threshold=found.threshold(sparsity, 512))
        assert abs(float(skipped.float().mean()) - sparsity) < 0.05
    assert found.threshold(0, 512) == 0 and SkipCalibration(1.0, 20.0).threshold(0.9, 10) == 1
    assert SkipCalibration(3.0, 2.0).threshold(0.5, 100) == pytest.approx(3 * math.e / 100)
    with pytest.raises(ValueError, match="no threshold up to 1"):
        calibrate_skip(query[:, :16], key[:, :16], mask=full_lists(1, 16))
    with pytest.raises(ValueError, match="sparsity=1"):
        found.threshold(1, 512)


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_thresholds_outside_of_shares_are_refused(value):
    inputs = make_inputs(CASE, torch.float32)
    with pytest.raises(ValueError, match=r"skip_threshold=.* must be in \[0, 1\]"):
        block_sparse_attention(**inputs, mask=make_mask(CASE), skip_threshold=value)
    with pytest.raises(ValueError, match=r"skip_threshold=.* must be in \[0, 1\]"):
        skipped_blocks(inputs["query"], inputs["key"], mask=make_mask(CASE), skip_threshold=value)


def test_kernels_refuse_blocks_longer_than_a_tile(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the choice of implementation reads
    pytest.importorskip("triton")
    with pytest.raises(NotImplementedError, match="blocks of up to 128 tokens here, not 256"):
        block_sparse_attention(
            *torch.randn(3, 1, 512, 1, 16), mask=full_lists(2, 256), skip_threshold=0.1, impl="triton"
        )


@pytest.mark.parametrize("export", [False, True])
def test_one_graph(export):
    inputs = {
        name: x.detach() for name, x in make_inputs(replace(CASE, extra=0), torch.float32).items() if x is not None
    }
    mask, share = make_mask(CASE), threshold(replace(CASE, extra=0))
    assert share

    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return block_sparse_attention(query, key, value, mask=mask, scale=1.0, skip_threshold=share)

    expected = block_sparse_attention(**inputs, mask=mask, scale=1.0, skip_threshold=share)
    given = tuple(inputs[name] for name in ("query", "key", "value"))
    if export:
        found = torch.export.export(Model(), given).module()(*given)
    else:
        torch._dynamo.reset()
        found = torch.compile(Model(), fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(found, expected)
