"""Merged parts are attention over all keys, gradients included, also where queries see nothing in some or all."""

import math

import pytest
import torch
from foveal.kernels.ops import BlockMask, block_sparse_attention, merge_attentions
from torch import Tensor

PARTS = (slice(0, 3), slice(3, 4), slice(4, 9))


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> tuple[Tensor, Tensor]:
    """Output `[T, heads, d]` and log-sum-exp; 0 and -inf, without gradients, where a query sees nothing."""
    logits = torch.einsum("ihd,jhd->ihj", q, k)
    nothing = ~sees.any(-1)
    logits = logits.masked_fill(~sees, -math.inf).masked_fill(nothing[..., None], 0)
    out = torch.einsum("ihj,jhd->ihd", logits.softmax(-1), v).masked_fill(nothing[..., None], 0)
    return out, logits.logsumexp(-1).masked_fill(nothing, -math.inf)


def problem(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """Query, key and value, and what queries see: none, one, two or all three of the parts."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, 2, 4, generator=generator, dtype=torch.float64).to(dtype) for n in (16, 9, 9)]
    sees = torch.rand(16, 2, 9, generator=generator) < 0.7
    for i, part in enumerate(PARTS):
        sees[torch.arange(16) >> i & 1 == 0, :, part] = False
    assert {int(sees[i, 0, part].any()) for i in range(16) for part in PARTS} == {0, 1}
    return [x.requires_grad_() for x in tensors], sees


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_attention_over_all_keys(dtype, tolerance):
    (q, k, v), sees = problem(dtype)
    merged = merge_attentions(*zip(*(attend(q, k[i], v[i], sees[..., i]) for i in PARTS), strict=True))
    whole = attend(q, k, v, sees)
    nothing = ~sees.any(-1)
    assert nothing.any() and (merged[0][nothing] == 0).all() and (merged[1][nothing] == -math.inf).all()
    cotangents = [torch.randn(x.shape, dtype=torch.float64).to(dtype) for x in whole]
    for got, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    grads = [torch.autograd.grad(x, (q, k, v), cotangents) for x in (merged, whole)]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=10 * tolerance, atol=10 * tolerance)
    assert (grads[0][0][nothing] == 0).all()


@pytest.mark.parametrize("junk", [0.0, math.nan, math.inf])
def test_a_part_without_keys_has_no_share_and_the_gradient_zero(junk):
    outs = [torch.randn(5, 2, 3, dtype=torch.float64) for _ in range(3)]
    lses = [torch.randn(5, 2, dtype=torch.float64) for _ in range(3)]
    for i, lse in enumerate(lses):
        lse[: 2 + i] = -math.inf
        outs[i][: 2 + i] = junk
    leaves = [x.requires_grad_() for x in (*outs, *lses)]
    merged, total = merge_attentions(leaves[:3], leaves[3:])
    assert (merged[:2] == 0).all() and (total[:2] == -math.inf).all()
    torch.testing.assert_close(merged[2], outs[0][2])
    torch.testing.assert_close(total[2], lses[0][2])
    grads = torch.autograd.grad((merged, total), leaves, [torch.randn_like(merged), torch.randn_like(total)])
    for i, grad in enumerate(grads):
        empty = 2 + i % 3
        assert (grad[:empty] == 0).all() and grad.isfinite().all() and (grad[empty:] != 0).all(), i


def test_gradients_of_gradients():
    outs, lses = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    lses[0, 1], lses[:, 2] = -math.inf, -math.inf
    finite = (lses > -math.inf).nonzero(as_tuple=True)

    def merge(outs, values):  # numbers beside the infinite ones, which have no differences
        merged, total = merge_attentions(outs.unbind(), lses.index_put(finite, values).unbind())
        return merged, total.masked_fill(total == -math.inf, 0)

    leaves = outs.requires_grad_(), lses[finite].requires_grad_()
    assert torch.autograd.gradcheck(merge, leaves) and torch.autograd.gradgradcheck(merge, leaves)


def test_not_a_number_shows():
    out, lse = torch.randn(3, 2, 4), torch.randn(3, 2)
    lse[1, 0] = math.nan
    merged, total = merge_attentions([out, out], [lse, torch.full_like(lse, -math.inf)])
    assert merged[1, 0].isnan().all() and total[1, 0].isnan() and merged[[0, 2]].isfinite().all()


def test_compiled_and_mapped():
    outs, lses = torch.randn(2, 5, 2, 4), torch.randn(2, 5, 2)
    lses[0, :3], lses[1, 1:4] = -math.inf, -math.inf
    expected = merge_attentions(outs.unbind(), lses.unbind())
    torch._dynamo.reset()
    compiled = torch.compile(merge_attentions, fullgraph=True, backend="aot_eager")
    mapped = torch.vmap(lambda a, b, x, y: merge_attentions([a, b], [x, y]))(*outs, *lses)
    for found in (compiled(outs.unbind(), lses.unbind()), mapped):
        for got, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_parts_of_block_lists(impl):
    """Lists cut in two, one of them empty for some blocks of queries and both for one, give what whole lists give."""
    kv_num = torch.tensor([2, 1, 0, 2], dtype=torch.int32).view(1, 1, 4)
    kv_idx = torch.tensor([[0, 3], [2, 0], [0, 0], [1, 2]], dtype=torch.int32).view(1, 1, 4, 2)
    first = BlockMask((4,), (4,), kv_num.clamp(max=1), kv_idx)
    second = BlockMask((4,), (4,), kv_num - first.kv_num, kv_idx.flip(-1))
    tensors = [torch.randn(1, 16, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    parts = [block_sparse_attention(*tensors, mask=mask, impl=impl, return_lse=True) for mask in (first, second)]
    merged = merge_attentions(*zip(*parts, strict=True))
    whole = block_sparse_attention(*tensors, mask=BlockMask((4,), (4,), kv_num, kv_idx), impl=impl, return_lse=True)
    cotangents = [torch.randn_like(x) for x in whole]
    for got, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(x, tensors, cotangents) for x in (merged, whole)]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    assert (grads[0][0][:, 8:12] == 0).all()


def test_wrong_parts_are_refused():
    out, lse = torch.randn(3, 2, 4), torch.randn(3, 2)
    wrong = {
        r"outs\[1\]\.dtype=torch\.bfloat16": ([out, out.bfloat16()], [lse, lse]),
        r"outs\[0\]\.dtype=torch\.int64": ([out.long()], [lse]),
        r"lses\[0\]\.device=meta": ([out], [lse.to("meta")]),
        r"outs\[1\] must be a tensor, got list": ([out, out.tolist()], [lse, lse]),
        r"lses\[0\] must be a dense tensor": ([out], [lse.to_sparse()]),
        r"outs must be a list or tuple, got Tensor": (torch.stack([out, out]), [lse, lse]),
        r"lses must be a list or tuple, got NoneType": ([out], None),
        r"lses of \(3, 3\)": ([out], [torch.randn(3, 3)]),
        "at least one": ([], []),
    }
    for message, (outs, lses) in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message):
            merge_attentions(outs, lses)
