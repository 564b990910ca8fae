"""Bi-level routing against the paper's gather of regions, and what the operators refuse."""

import pytest
import torch
from foveal.kernels.block_sparse.routing import make_routing_mask
from foveal.kernels.ops import BlockMask, block_sparse_attention, explain, routing_attention2d
from torch import Tensor
from torch.nn.functional import pad


def gather_regions(query: Tensor, key: Tensor, value: Tensor, size: tuple[int, int], topk: int) -> Tensor:
    """BiFormer's algorithm 1 as written: region means, top-k, all tokens of the chosen regions gathered.

    Tokens that only fill up the last regions count nowhere.
    """
    batch, height, width, heads, d = query.shape
    rows, columns = -(-height // size[0]), -(-width // size[1])

    def regions(x: Tensor) -> Tensor:  # [B, regions, tokens, heads * d]
        x = pad(x.flatten(3), (0, 0, 0, columns * size[1] - width, 0, rows * size[0] - height))
        x = x.view(batch, rows, size[0], columns, size[1], -1).transpose(2, 3)
        return x.reshape(batch, rows * columns, size[0] * size[1], -1)

    q, k, v, real = map(regions, (query, key, value, torch.ones_like(query)))
    means = (x.sum(2) / real.sum(2) for x in (q, k))
    chosen = torch.einsum("bic,bjc->bij", *means).topk(topk).indices  # [B, regions, topk]
    k, v, real = (x[torch.arange(batch)[:, None, None], chosen].flatten(2, 3) for x in (k, v, real))
    q, k, v, real = (x.unflatten(-1, (heads, d)) for x in (q, k, v, real))
    logits = torch.einsum("brthd,brshd->brhts", q, k) * (heads * d) ** -0.5
    logits = logits.masked_fill(real[..., 0].permute(0, 1, 3, 2)[:, :, :, None] == 0, float("-inf"))
    out = torch.einsum("brhts,brshd->brthd", logits.softmax(-1), v)
    out = out.view(batch, rows, columns, *size, heads, d).transpose(2, 3)
    return out.reshape(batch, rows * size[0], columns * size[1], heads, d)[:, :height, :width]


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(
    ("shape", "arguments", "size"),
    [
        ((14, 21), {"topk": 4}, (2, 3)),
        ((14, 14), {"topk": 1}, (2, 2)),
        ((12, 8), {"topk": 3, "regions": (3, 2)}, (4, 4)),
        ((13, 20), {"topk": 5, "region_size": (2, 3)}, (2, 3)),
        ((9, 9), {"topk": 2, "region_size": 4}, (4, 4)),
    ],
)
def test_routing_is_the_gather_of_regions(impl, shape, arguments, size):
    query, key, value = (x.requires_grad_() for x in torch.randn(3, 2, *shape, 3, 8, dtype=torch.float64))
    grad = torch.randn_like(query)
    found = routing_attention2d(query, key, value, impl=impl, **arguments)
    expected = gather_regions(query, key, value, size, arguments["topk"])
    torch.testing.assert_close(found, expected)
    for got, exact in zip(*(torch.autograd.grad(x, (query, key, value), grad) for x in (found, expected)), strict=True):
        torch.testing.assert_close(got, exact)


X = torch.zeros(1, 14, 14, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topk": 0}, "topk=0 must lie in"),
        ({"topk": 50}, "topk=50 must lie in"),
        ({"topk": 1, "regions": (4, 7)}, "regions=.* must divide the grid"),
        ({"topk": 1, "regions": 0}, "regions=0 must be at least 1"),
        ({"topk": 1, "region_size": (0, 2)}, "region_size=.* must be at least 1"),
        ({"topk": 1, "regions": (7, 7, 7)}, "regions=.* has 3 values"),
    ],
)
def test_routing_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        routing_attention2d(X, X, X, **arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(2, 2), (3, 5)])
def test_regions_are_chosen_in_float32(dtype, size):
    """Products of means that pass 65,504 do not tie, and autocast does not choose otherwise."""
    query, key = (30 * torch.randn(2, 1, 8, 8, 12, 32)).to(dtype)
    exact = make_routing_mask(query.double(), key.double(), size=size, topk=3).kv_idx.sort(-1).values
    with torch.autocast("cpu", torch.bfloat16):
        plain = make_routing_mask(query.float(), key.float(), size=size, topk=3).kv_idx.sort(-1).values
    assert torch.equal(plain, exact)
    half = make_routing_mask(query, key, size=size, topk=3).kv_idx.sort(-1).values
    assert (half == exact).float().mean() > 0.9  # the means of ragged regions are rounded


def test_routing_refuses_grouped_heads():
    with pytest.raises(ValueError, match=r"key.shape=.* must equal query.shape"):
        routing_attention2d(X, X[..., :1, :], X[..., :1, :], topk=1)


def mask(**fields) -> BlockMask:
    good = BlockMask((7, 7), (7, 7), torch.ones(1, 1, 4).int(), torch.zeros(1, 1, 4, 2).int())
    return good._replace(**fields)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"query_block": (7,)}, ValueError, r"mask.query_block=\(7,\) must be 2 positive"),
        ({"key_block": (7, 0)}, ValueError, r"mask.key_block=\(7, 0\) must be 2 positive"),
        ({"kv_num": torch.ones(1, 1, 3).int()}, ValueError, r"mask.kv_num.shape=\(1, 1, 3\) must be \(1, 1, 4\)"),
        ({"kv_num": torch.ones(1, 1, 4)}, TypeError, "mask.kv_num.dtype=torch.float32 must be torch.int32"),
        ({"kv_idx": torch.zeros(1, 1, 4, 2)}, TypeError, "mask.kv_idx.dtype=torch.float32 must be torch.int32"),
        ({"kv_idx": torch.zeros(1, 3, 4, 2).int()}, ValueError, r"mask.kv_idx.shape=\(1, 3, 4, 2\) must be"),
        ({"bias": torch.zeros(1, 1, 4, 3)}, ValueError, r"mask.bias.shape=\(1, 1, 4, 3\) must be \(1, 1, 4, 2\)"),
        ({"bias": torch.zeros(1, 1, 4, 2).int()}, TypeError, "mask.bias.dtype=torch.int32 must be a floating"),
        ({"bias": torch.zeros(1, 1, 4, 2, requires_grad=True)}, ValueError, "mask.bias requires gradients"),
        ({"q_len": torch.zeros(5).int()}, ValueError, r"mask.q_len.shape=\(5,\) must be \(4,\)"),
        ({"kv_len": torch.zeros(4)}, TypeError, "mask.kv_len.dtype=torch.float32 must be torch.int32"),
        ({"kv_len": torch.zeros(4, device="meta").int()}, ValueError, "mask.kv_len.device=meta must equal"),
        ({"kv_num": torch.full((1, 1, 4), 3).int()}, ValueError, "mask.kv_num holds 3; lists have 2 entries"),
        ({"kv_idx": torch.full((1, 1, 4, 2), 4).int()}, ValueError, "mask.kv_idx lists boxes 4 to 4; there are 4"),
        ({"kv_idx": torch.full((1, 1, 4, 2), -1).int()}, ValueError, "mask.kv_idx lists boxes -1 to -1; there are 4"),
        (
            {"inverse": (torch.zeros(1, 1, 6).int(), torch.zeros(1, 1, 8).int())},
            ValueError,
            r"mask.inverse\[0\].shape=\(1, 1, 6\) must be \(1, 1, 5\)",
        ),
    ],
)
def test_masks_are_checked(fields, error, message):
    with pytest.raises(error, match=message):
        block_sparse_attention(X, X, X, mask=mask(**fields))


def test_other_arguments_are_checked():
    with pytest.raises(TypeError, match="mask must be a BlockMask, got tuple"):
        block_sparse_attention(X, X, X, mask=())
    with pytest.raises(ValueError, match="1 to 3 spatial axes"):
        block_sparse_attention(X[0, 0], X, X, mask=mask())
    with pytest.raises(ValueError, match=r"key.shape=.* in all but heads and spatial axes"):
        block_sparse_attention(X, *torch.zeros(2, 1, 14, 14, 2, 4), mask=mask())
    with pytest.raises(NotImplementedError, match="impl='triton' cannot take this call: device cpu"):
        block_sparse_attention(X, X, X, mask=mask(), impl="triton")


def test_explained():
    found = explain(block_sparse_attention, X, X, X, mask=mask(kv_len=torch.tensor([40, 49, 49, 49]).int()))
    assert found.impl == "torch"
    assert found.cost["keys_per_query"] == 40
    assert found.cost["forward_flops"] == 4 * 2 * 8 * 14 * 14 * 40
    found = explain(routing_attention2d, X, X, X, topk=3, regions=2)
    assert found.cost["keys_per_query"] == 3 * 49 and found.cost["region"] == "7×7"
