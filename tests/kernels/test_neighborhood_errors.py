"""Every wrong argument is refused with the right exception, which names the argument and its value."""

import math
import os

import pytest
import torch
from foveal.kernels.ops import merge_attentions, na1d, na2d, na3d


def grid(*shape, heads=2, dim=4, dtype=torch.float32, device="cpu"):
    return torch.randn(1, *shape, heads, dim, dtype=torch.float32).to(device, dtype)


Q = grid(6, 8)
TABLE = torch.zeros(2, 5, 5)
WRONG = {
    "window over axis": ({"window": (7, 3)}, ValueError, r"window=7 on axis 0 .* length 6"),
    "window zero": ({"window": 0}, ValueError, "window=0 on axis 0"),
    "window float": ({"window": 3.0}, TypeError, r"window=3\.0"),
    "window bool": ({"window": True}, TypeError, "window=True"),
    "window count": ({"window": (3, 3, 3)}, ValueError, r"window=\(3, 3, 3\) has 3 values"),
    "stride over window": ({"window": 3, "stride": (1, 4)}, ValueError, r"stride=4 on axis 1 .*window=3"),
    "stride zero": ({"window": 3, "stride": 0}, ValueError, "stride=0 on axis 0"),
    "dilation zero": ({"window": 3, "dilation": 0}, ValueError, "dilation=0 on axis 0"),
    "dilation over axis": (
        {"window": 3, "dilation": 3},
        ValueError,
        r"dilation=3 times window=3 on axis 0 .* 6",
    ),
    "causal integer": ({"window": 3, "causal": 1}, TypeError, "causal=1"),
    "bias with even window": ({"window": (3, 4), "bias": TABLE}, ValueError, r"window=\[3, 4\] must be odd .* bias"),
    "bias shape": ({"window": 3, "bias": TABLE[:, :4]}, ValueError, r"bias\.shape=\(2, 4, 5\).*\(2, 5, 5\)"),
    "bias heads": ({"window": 3, "bias": TABLE[:1]}, ValueError, r"bias\.shape=\(1, 5, 5\)"),
    "bias dtype": ({"window": 3, "bias": TABLE.long()}, ValueError, r"bias \(torch\.int64"),
    "extra key alone": (
        {"window": 3, "additional_keys": torch.zeros(1, 2, 2, 4)},
        ValueError,
        "additional_keys and additional_values",
    ),
    "impl": ({"window": 3, "impl": "cuda"}, ValueError, "impl='cuda'"),
    "heads": ({"window": [(3, 3)] * 3}, ValueError, r"window=\[.*\] has 3 entries; expected one for each of 2 heads"),
    "axes of a head": ({"window": [(3, 3), (3,)]}, ValueError, r"window\[1\]=\(3,\) has 1 values"),
    "window of a head": ({"window": [(3, 3), (7, 3)]}, ValueError, r"window=7 on axis 0 .* length 6"),
    "stride of a head": ({"window": 3, "stride": [(1, 1), (1, 4)]}, ValueError, r"stride=4 on axis 1 .*window=3"),
    "causal of a head": ({"window": 3, "causal": [(True, 1), (True, True)]}, TypeError, r"causal\[0\]=\(True, 1\)"),
    "bias of heads": (
        {"window": [(3, 3), (5, 3)], "bias": TABLE},
        ValueError,
        r"bias\.shape=\(2, 5, 5\).*\(2, 9, 5\)",
    ),
    "bias with an even window of a head": ({"window": [(3, 3), (3, 4)], "bias": TABLE}, ValueError, r"window=\[3, 4\]"),
    "mask without keys": (
        {"window": 3, "additional_mask": torch.ones(1, 2).bool()},
        ValueError,
        "additional_mask must be given",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_option(options, error, message):
    with pytest.raises(error, match=message):
        na2d(Q, Q, Q, **options)


TENSORS = {
    "not a tensor": ([1.0], Q, Q, TypeError, "query must be a tensor, got list"),
    "rank": (Q[0], Q[0], Q[0], ValueError, r"query has shape \(6, 8, 2, 4\)"),
    "integer": (Q.long(), Q.long(), Q.long(), TypeError, r"query\.dtype=torch\.int64"),
    "key dtype": (Q, Q.half(), Q, TypeError, r"key\.dtype=torch\.float16"),
    "value dtype": (Q, Q, Q.double(), TypeError, r"value\.dtype=torch\.float64"),
    "key shape": (Q, grid(6, 7), grid(6, 7), ValueError, r"key\.shape=\(1, 6, 7, 2, 4\)"),
    "value shape": (Q, Q, Q[:, :, 1:], ValueError, r"value\.shape=\(1, 6, 7, 2, 4\)"),
    "value without features": (Q, Q, Q[..., :0], ValueError, r"value\.shape=\(1, 6, 8, 2, 0\)"),
    "head_dim": (Q, Q[..., :2], Q[..., :2], ValueError, r"key\.shape=\(1, 6, 8, 2, 2\)"),
    "heads": (grid(6, 8, heads=3), Q, Q, ValueError, r"query heads \(3\) must be a multiple of key heads \(2\)"),
    "empty axis": (Q[:, :0], Q[:, :0], Q[:, :0], ValueError, r"query\.shape=\(1, 0, 8, 2, 4\)"),
    "key device": (Q, Q.to("meta"), Q, ValueError, r"key\.device=meta"),
    "value device": (Q, Q, Q.to("meta"), ValueError, r"value\.device=meta"),
}


@pytest.mark.parametrize(("query", "key", "value", "error", "message"), TENSORS.values(), ids=TENSORS.keys())
def test_tensor(query, key, value, error, message):
    with pytest.raises(error, match=message):
        na2d(query, key, value, window=3)


EXTRA = {
    "batch": (torch.zeros(2, 3, 2, 4), None, ValueError, r"additional_keys\.shape=\(2, 3, 2, 4\)"),
    "heads": (torch.zeros(1, 3, 1, 4), None, ValueError, r"additional_keys\.shape=\(1, 3, 1, 4\)"),
    "width": (torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 5), ValueError, r"additional_values\.shape=\(1, 3, 2, 5\)"),
    "dtype": (torch.zeros(1, 3, 2, 4).double(), None, ValueError, r"additional_keys \(torch\.float64"),
    "tokens": (
        torch.zeros(1, 3, 2, 4),
        torch.zeros(1, 4, 2, 4),
        ValueError,
        r"additional_values\.shape=\(1, 4, 2, 4\)",
    ),
}


@pytest.mark.parametrize(("additional_keys", "additional_values", "error", "message"), EXTRA.values(), ids=EXTRA.keys())
def test_extra(additional_keys, additional_values, error, message):
    with pytest.raises(error, match=message):
        na2d(
            Q,
            Q,
            Q,
            window=3,
            additional_keys=additional_keys,
            additional_values=additional_keys if additional_values is None else additional_values,
        )


MASKS = {
    "list": ([True, False, True], TypeError, "additional_mask must be a tensor or None, got list"),
    "float": (torch.zeros(1, 3), TypeError, r"additional_mask\.dtype=torch\.float32 must be bool or an integer dtype"),
    "integers for a mask": (
        torch.ones(1, 3).long(),
        ValueError,
        r"additional_mask \(torch\.int64, \(1, 3\)\) must be a bool mask \[B, tokens\] or integer lengths \[B\].*=3",
    ),
    "tokens": (torch.ones(1, 2).bool(), ValueError, r"\(torch\.bool, \(1, 2\)\) must be .*B=1, tokens=3"),
    "batch": (torch.tensor([1, 2]), ValueError, r"\(torch\.int64, \(2,\)\)"),
    "long": (torch.tensor([4]), ValueError, r"additional_mask=\[4\] must hold lengths from 0 to 3"),
    "negative": (torch.tensor([-1], dtype=torch.int8), ValueError, r"additional_mask=\[-1\]"),
    "device": (torch.ones(1, 3, device="meta").bool(), ValueError, r"additional_mask\.device=meta"),
}


@pytest.mark.parametrize(("additional_mask", "error", "message"), MASKS.values(), ids=MASKS.keys())
def test_extra_mask(additional_mask, error, message):
    extra = torch.zeros(1, 3, 2, 4)
    with pytest.raises(error, match=message):
        na2d(Q, Q, Q, window=3, additional_keys=extra, additional_values=extra, additional_mask=additional_mask)


TOKENS = Q.flatten(1, 2)
GRIDS = {
    "tokens": ({"grid": (6, 7)}, TOKENS, ValueError, r"grid=\(6, 7\) must hold the 48 tokens of query"),
    "negative": ({"grid": (-6, -8)}, TOKENS, ValueError, r"grid=\(-6, -8\)"),
    "axes": ({"grid": (2, 4, 6)}, TOKENS, ValueError, r"grid=\(2, 4, 6\) must hold .* 2 spatial axes"),
    "number": ({"grid": 48}, TOKENS, TypeError, "grid must be a list or tuple, got int"),
    "float": ({"grid": (6.0, 8)}, TOKENS, TypeError, r"grid\[0\]=6\.0 must be an integer, got float"),
    "unflattened": ({"grid": (6, 8)}, Q, ValueError, r"query has shape \(1, 6, 8, 2, 4\); with grid=\(6, 8\) expected"),
    "without grid": ({}, TOKENS, ValueError, r"query has shape \(1, 48, 2, 4\)"),
    "no tensor": ({"grid": (6, 8)}, None, TypeError, "query must be a tensor"),
}


@pytest.mark.parametrize(("options", "x", "error", "message"), GRIDS.values(), ids=GRIDS.keys())
def test_grid(options, x, error, message):
    with pytest.raises(error, match=message):
        na2d(x, x, x, window=3, **options)


@pytest.mark.parametrize("operator", [na1d, na3d])
def test_grid_of_another_rank(operator):
    with pytest.raises(ValueError, match=r"query has shape \(1, 6, 8, 2, 4\)"):
        operator(Q, Q, Q, window=1)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter serves CPU tensors")
def test_triton_is_not_replaced_in_silence():
    with pytest.raises(NotImplementedError, match=r"impl='triton' cannot take this call: .*cpu"):
        na2d(Q, Q, Q, window=3, impl="triton")


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "at least one"),
        ([Q], [], "got 1 and 0"),
        ([Q, Q[:, :3]], [Q[..., 0], Q[:, :3, ..., 0]], r"\(1, 3, 8, 2, 4\)"),
        ([Q], [Q], r"lses of \(1, 6, 8, 2, 4\)"),
    ],
    ids=["none", "number", "outs", "lses"],
)
def test_merge_refuses(outs, lses, message):
    with pytest.raises(ValueError, match=message):
        merge_attentions(outs, lses)


def _attention(q, k, v):  # [B, T, heads, d] -> out, lse
    logits = torch.einsum("bihd,bjhd->bihj", q, k)
    return torch.einsum("bihj,bjhd->bihd", logits.softmax(-1), v), logits.logsumexp(-1)


def test_merge_equals_attention_on_the_union_and_so_do_gradients():
    q, k, v = (torch.randn(2, 9, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    parts = [_attention(q, k[:, i], v[:, i]) for i in (slice(0, 4), slice(4, 5), slice(5, 9))]
    merged, whole = merge_attentions(*zip(*parts, strict=True)), _attention(q, k, v)
    cotangents = [torch.randn_like(x) for x in whole]
    for a, b in zip(merged, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), cotangents) for x in (merged, whole)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_merge_equals_extra_keys():
    q, k, v = (torch.randn(1, 20, 2, 8, dtype=torch.float64) for _ in range(3))
    ek, ev = (torch.randn(1, 5, 2, 8, dtype=torch.float64) for _ in range(2))
    near = na1d(q, k, v, window=7, scale=1.0, return_lse=True)
    merged = merge_attentions(*zip(near, _attention(q, ek, ev), strict=True))
    for a, b in zip(
        merged,
        na1d(q, k, v, window=7, scale=1.0, additional_keys=ek, additional_values=ev, return_lse=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_merge_gradcheck():
    outs = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lses = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b, x, y: merge_attentions([a, b], [x, y]), (*outs, *lses))


def test_merge_ignores_a_part_without_keys():
    out, lse = torch.randn(4, 2, 3), torch.randn(4, 2)
    empty = torch.full_like(lse, -math.inf)
    merged, total = merge_attentions([out, torch.zeros_like(out)], [lse, empty])
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(total, lse)
    nothing, total = merge_attentions([torch.zeros_like(out)] * 2, [empty, empty])
    assert (nothing == 0).all() and (total == -math.inf).all()


def test_merge_keeps_the_dtype_of_outputs():
    out, lse = torch.randn(4, 2, 3).bfloat16(), torch.randn(4, 2)
    merged, total = merge_attentions([out, out], [lse, lse])
    assert merged.dtype == torch.bfloat16 and total.dtype == torch.float32
    torch.testing.assert_close(merged, out, rtol=2**-7, atol=0.0)
