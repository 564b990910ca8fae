"""Ragged batches: every entry as if it were alone, gradients included, whichever form the batch has."""

import warnings
from functools import partial
from math import prod

import pytest
import torch
from foveal.kernels.masks import sta
from foveal.kernels.masks.blocks import to_mask
from foveal.kernels.ops import (
    RaggedLayout,
    block_sparse_attention,
    explain,
    linear_attention,
    na1d,
    na2d,
    na3d,
    ragged_attention,
    window_attention,
)
from foveal.kernels.ragged import groups
from torch import Tensor

SIZES = {
    1: [(9,), (5,), (9,), (12,), (5,)],
    2: [(7, 5), (5, 9), (7, 5), (6, 6), (5, 7), (5, 9)],
    3: [(3, 5, 4), (3, 4, 5), (3, 5, 4)],
}
F64 = {"dtype": torch.float64}


def batch(sizes, *counts: int, head_dim: int = 4) -> list[Tensor]:
    """Packed query, key and value."""
    tokens = RaggedLayout(sizes).tokens
    return [torch.randn(tokens, n, head_dim, **F64, requires_grad=True) for n in counts]


def one_by_one(operator, tensors, sizes, key_sizes=None, **options) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a loop over the entries; options in a list have an entry each."""
    layouts = [RaggedLayout(x) for x in (sizes, key_sizes or sizes, key_sizes or sizes)]
    ends = [x.split([*map(prod, y.sizes)]) for x, y in zip(tensors, layouts, strict=True)]
    outs = []
    for i, pieces in enumerate(zip(*ends, strict=True)):
        alone = [x.unflatten(0, y.sizes[i])[None] for x, y in zip(pieces, layouts, strict=True)]
        given = {name: x[i] if isinstance(x, list) else x for name, x in options.items()}
        found = operator(*alone, **given, return_lse=True)
        outs.append((found[0].flatten(0, -3), found[1].flatten(0, -2)))
    return tuple(torch.cat(x) for x in zip(*outs, strict=True))


def assert_alike(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], inputs) -> None:
    cotangents = [torch.randn_like(x) for x in expected]
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)
    grads = (torch.autograd.grad(x, inputs, cotangents) for x in (got, expected))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank, operator", [(1, na1d), (2, na2d), (3, na3d)])
def test_neighborhoods(rank, operator):
    torch.manual_seed(0)
    inputs = batch(SIZES[rank], 4, 2, 2)
    bias = torch.randn(4, *[5] * rank, **F64, requires_grad=True)
    extra = [torch.randn(len(SIZES[rank]), 3, 2, 4, **F64, requires_grad=True) for _ in range(2)]
    lengths = torch.arange(len(SIZES[rank])) % 4
    shared = {"window": 3, "bias": bias, "scale": 0.4, "causal": (True, *[False] * (rank - 1))}
    found = ragged_attention(
        operator, *inputs, sizes=SIZES[rank], **shared, additional_keys=extra[0], additional_values=extra[1],
        additional_mask=lengths, return_lse=True,
    )  # fmt: skip
    rows = {"additional_keys": extra[0], "additional_values": extra[1], "additional_mask": lengths}
    expected = one_by_one(operator, inputs, SIZES[rank], **shared, **{k: list(x[:, None]) for k, x in rows.items()})
    assert_alike(found, expected, (*inputs, bias, *extra))


def test_windows():
    inputs = batch(SIZES[2], 2, 2, 2)
    bias = torch.randn(2, 12, 12, **F64, requires_grad=True)
    options = {"window": (3, 4), "shift": (1, 2), "bias": bias}
    found = ragged_attention(window_attention, *inputs, sizes=SIZES[2], **options, return_lse=True)
    assert_alike(found, one_by_one(window_attention, inputs, SIZES[2], **options), (*inputs, bias))


def test_lists_of_blocks():
    """Masks of every size, and keys of other sizes."""
    torch.manual_seed(0)

    def make_mask(query: Tensor, key: Tensor):
        return sta(query.shape[1:-2], tile=(2, 2), window=(2, 2))

    inputs = batch(SIZES[2], 2, 2, 2)
    masks = [sta(size, tile=(2, 2), window=(2, 2)) for size in SIZES[2]]
    found = ragged_attention(block_sparse_attention, *inputs, sizes=SIZES[2], mask=make_mask, return_lse=True)
    assert_alike(found, one_by_one(block_sparse_attention, inputs, SIZES[2], mask=masks), inputs)

    key_sizes = [(4, 4), (3, 5), (4, 4), (3, 5), (3, 5), (2, 9)]

    def first_blocks(query: Tensor, key: Tensor):

        kept = torch.ones(
            -(-query.shape[1] // 3) * -(-query.shape[2] // 3), -(-key.shape[1] // 2) * -(-key.shape[2] // 2)
        )
        kept[:, 1::2] = 0
        return to_mask(kept.bool(), query_block=(3, 3), key_block=(2, 2))

    inputs = [*batch(SIZES[2], 2), *batch(key_sizes, 2, 2)]
    options = {"sizes": SIZES[2], "key_sizes": key_sizes, "mask": first_blocks, "return_lse": True}
    found = ragged_attention(block_sparse_attention, *inputs, **options)
    grids = [[torch.empty(1, *size, 1, 1) for size in pair] for pair in zip(SIZES[2], key_sizes, strict=True)]
    masks = [first_blocks(*pair) for pair in grids]
    expected = one_by_one(block_sparse_attention, inputs, SIZES[2], key_sizes, mask=masks)
    assert_alike(found, expected, inputs)


def test_forms():
    """Packed, listed and nested batches give the same numbers in their own forms."""
    sizes = SIZES[2]
    layout = RaggedLayout(sizes)
    q, k, v = (x.detach() for x in batch(sizes, 2, 2, 2))
    expected = ragged_attention(na2d, q, k, v, sizes=layout, window=3)

    def split(x: Tensor) -> list[Tensor]:
        return [piece.unflatten(0, size) for piece, size in zip(x.split([a * b for a, b in sizes]), sizes, strict=True)]

    listed = ragged_attention(na2d, *map(split, (q, k, v)), window=3)
    assert all(torch.equal(x, y) for x, y in zip(listed, split(expected), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its nested tensors of layout strided are a prototype
        strided = [torch.nested.as_nested_tensor(split(x), layout=torch.strided).requires_grad_() for x in (q, k, v)]
        found = ragged_attention(na2d, *strided, window=3)
        assert found.is_nested and all(torch.equal(x, y) for x, y in zip(found.unbind(), split(expected), strict=True))
        (grad,) = torch.autograd.grad(sum(x.square().sum() for x in found.unbind()), strided[0])
        assert grad.is_nested
    offsets = torch.tensor([0, *[a * b for a, b in sizes]]).cumsum(0)
    jagged = [torch.nested.nested_tensor_from_jagged(x, offsets).requires_grad_() for x in (q, k, v)]
    found = ragged_attention(na2d, *jagged, sizes=sizes, window=3)
    assert torch.equal(found.values(), expected)
    of_packed, of_jagged = (
        ragged_attention(na2d, *x, sizes=sizes, window=3, return_lse=True)[1] for x in ((q, k, v), jagged)
    )
    assert torch.equal(of_jagged.values(), of_packed)
    found.values().sum().backward()
    assert jagged[0].grad.shape == jagged[0].shape
    sequence = ragged_attention(na1d, *jagged, window=3)
    ends = RaggedLayout.from_cumulative(offsets.int())
    assert torch.equal(sequence.values(), ragged_attention(na1d, q, k, v, sizes=ends, window=3))


def test_one_launch_a_size_and_no_copy_of_sorted_batches(monkeypatch):
    calls, moved = [], []

    def counted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append(query.shape)
        return na2d(query, key, value, window=3)

    gather = groups._Permute.apply
    monkeypatch.setattr(groups._Permute, "apply", lambda *x: moved.append(1) or gather(*x))
    q, k, v = batch(SIZES[2], 2, 2, 2)
    ragged_attention(counted, q, k, v, sizes=SIZES[2])
    assert calls == [(2, 7, 5, 2, 4), (2, 5, 9, 2, 4), (1, 6, 6, 2, 4), (1, 5, 7, 2, 4)] and len(moved) == 4
    ragged_attention(counted, *batch(sorted(SIZES[2]), 2, 2, 2), sizes=sorted(SIZES[2]))
    assert len(calls) == 8 and len(moved) == 4
    ragged_attention(lambda *x: linear_attention(*x), q, k, v, sizes=SIZES[2])  # any operator on grids


def test_windows_cut_to_small_entries():
    sizes = [(2, 9), (9, 9), (9, 2)]
    q, k, v = batch(sizes, 1, 1, 1)

    def fitting(query: Tensor, key: Tensor) -> list[int]:
        return [min(3, n) for n in query.shape[1:-2]]

    out = ragged_attention(na2d, q, k, v, sizes=sizes, window=fitting)
    last = (x[-18:].view(1, 9, 2, 1, 4) for x in (q, k, v))
    torch.testing.assert_close(out[-18:].view(1, 9, 2, 1, 4), na2d(*last, window=(3, 2)))
    with pytest.raises(ValueError, match="window=3 on axis 0 must not exceed its length 2"):
        ragged_attention(na2d, q, k, v, sizes=sizes, window=3)


def test_empty_entries():
    sizes = [(0,), (5,), (0,), (7,)]
    q, k, v = batch(sizes, 1, 1, 1)
    out = ragged_attention(na1d, q, k, v, sizes=sizes, window=3)
    torch.testing.assert_close(out, ragged_attention(na1d, q, k, v, sizes=[5, 7], window=3))
    nothing = ragged_attention(na1d, q[:0], k[:0], v[:0], sizes=[0, 0], window=3, return_lse=True)
    assert [x.shape for x in nothing] == [(0, 1, 4), (0, 1)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_that_of_the_operator(dtype):
    q, k, v = (x.detach().to(dtype) for x in batch(SIZES[2], 2, 2, 2))
    out = ragged_attention(na2d, q, k, v, sizes=SIZES[2], window=3)
    expected, _ = one_by_one(partial(na2d, window=3), (q, k, v), SIZES[2])
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_compiled():
    layout = RaggedLayout(SIZES[1])
    q, k, v = (x.detach().float() for x in batch(SIZES[1], 2, 2, 2))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ragged_attention(na1d, q, k, v, sizes=layout, window=3)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


def test_explained():
    q, k, v = batch(SIZES[2], 2, 2, 2)
    found = explain(na2d, q, k, v, sizes=SIZES[2], window=3)
    alone = [explain(na2d, *(torch.empty(1, *size, 2, 4) for _ in range(3)), window=3) for size in SIZES[2]]
    assert found.impl == "torch" and found.cost["forward_flops"] == sum(x.cost["forward_flops"] for x in alone)
    assert found.cost["entries"] == 6 and found.cost["batches"] == 4 and found.cost["gathered_bytes"] > 0
    assert "ragged" in str(found)
    assert explain("na2d", q, k, v, sizes=sorted(SIZES[2]), window=3).cost["gathered_bytes"] == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sizes": None}, "sizes must be given, since query is a packed tensor"),
        ({"sizes": []}, "at least one entry"),
        ({"sizes": [(3, 3), (3,)]}, r"sizes\[1\]=\(3,\) must have 1 to 3 axes, as many as"),
        ({"sizes": [(3, -3)]}, "must hold integers of at least 0"),
        ({"sizes": [(3, 3)]}, r"query.shape=\(6, 1, 4\) must be .tokens, heads, head_dim. with the 9 tokens"),
        ({"sizes": torch.ones(2)}, "must hold integers"),
        ({"sizes": 3}, "sizes must be a list, a tuple or a tensor"),
        ({"key_sizes": [(2, 3), (0, 0)]}, "sizes has 1 entries and key_sizes 2"),
        ({"additional_keys": torch.zeros(2, 1, 1, 4), "additional_values": None}, "must have one row for each entry"),
        ({"operator": "na2d"}, "must be an attention operator"),
        ({"query": [torch.zeros(2, 3, 1, 4), 5]}, "query must be a packed or nested tensor, or a list of tensors"),
    ],
)
def test_refused(change, message):
    tensors = {name: torch.zeros(6, 1, 4) for name in ("query", "key", "value")}
    with pytest.raises((ValueError, TypeError), match=message):
        ragged_attention(**{"operator": na2d, "sizes": [(2, 3)], "window": 2, **tensors, **change})
    with pytest.raises(ValueError, match="must begin with 0"):
        RaggedLayout.from_cumulative([1, 2])
