"""Attention to summaries of blocks, by learned masks, of convolved sequences."""

import pytest
import torch
from foveal.kernels.ops import block_sparse_attention
from foveal.layers.convolved import ConvolvedAttention
from foveal.layers.learned_mask import LearnedMask
from foveal.layers.summaries import block_summaries, summarized_attention
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# summaries of blocks


@pytest.mark.parametrize("kind", ["mean", "max_query"])
@pytest.mark.parametrize(("shape", "block"), [((11,), (4,)), ((5, 6), (2, 3)), ((2, 4, 4), (2, 2, 2))])
def test_summaries_of_other_blocks_and_own_tokens_share_a_softmax(kind, shape, block):
    q, k, v = (double(2, *shape, 2, 4).requires_grad_() for _ in range(3))
    keys, values = (x.flatten(1, -3) for x in block_summaries(q, k, v, block=block, kind=kind, scale=0.5))
    at = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), -1).view(-1, len(shape))
    grid = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    number = torch.zeros(len(at), dtype=torch.long)
    for axis, (count, side) in enumerate(zip(grid, block, strict=True)):
        number = number * count + at[:, axis] // side
    sizes = number.bincount()
    qs, ks, vs = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    near = (qs @ ks.mT * 0.5).masked_fill(number[:, None] != number, -torch.inf)
    far = qs @ keys.transpose(1, 2).mT * 0.5 + (sizes.log() if kind == "mean" else 0)
    far = far.masked_fill(number[:, None] == torch.arange(len(sizes)), -torch.inf)
    weights = torch.cat([near, far], -1).softmax(-1)
    expected = weights @ torch.cat([vs, values.transpose(1, 2)], 2)
    out = summarized_attention(q, k, v, block=block, kind=kind, scale=0.5)
    torch.testing.assert_close(out.flatten(1, -3).transpose(1, 2), expected, rtol=1e-9, atol=1e-9)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), grad)
    theirs = torch.autograd.grad(expected, (q, k, v), grad.flatten(1, -3).transpose(1, 2))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_every_token_is_seen_once():
    """Rows of the implied weights sum to one; constant keys make it the plain mean of all tokens."""
    q, v, same = double(1, 12, 1, 4), double(1, 12, 1, 4), double(1, 1, 1, 4).expand(1, 12, 1, 4)
    ones = torch.ones_like(v)
    for kind in ("mean", "max_query"):
        torch.testing.assert_close(summarized_attention(q, double(1, 12, 1, 4), ones, block=4, kind=kind), ones)
    out = summarized_attention(q, same, v, block=4, kind="mean")
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(v))
    whole = summarized_attention(q, q, v, block=12)
    torch.testing.assert_close(whole, F.scaled_dot_product_attention(q[:, :, 0], q[:, :, 0], v[:, :, 0])[:, :, None])
    with pytest.raises(ValueError, match="kind='sum'"):
        summarized_attention(q, q, v, block=4, kind="sum")
    with pytest.raises(ValueError, match="one grid and as many heads"):
        summarized_attention(q, q[:, :8], v[:, :8], block=4)


# masks that are learned


def test_learned_masks_range_from_all_to_themselves():
    mask = LearnedMask(6).double()
    q, k, v = (double(1, 1, 6, 4) for _ in range(3))
    for value, expected in ((60.0, F.scaled_dot_product_attention(q, k, v)), (-60.0, v)):
        torch.nn.init.constant_(mask.weight, value)
        for official in (False, True):
            mask.official = official
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask())
            exact = official or value > 0  # ours leaves 1e-4 of each weight
            torch.testing.assert_close(found, expected, **({} if exact else {"rtol": 0.1, "atol": 0.02}))
    assert mask.sparsity_loss() < 1e-20 and mask.visible().diagonal().eq(1).all()


def test_text_sees_the_clip_and_not_the_other_way():
    mask = LearnedMask(4)
    torch.nn.init.normal_(mask.weight, std=3)
    bias, clip = mask(text=3), mask()
    torch.testing.assert_close(bias[3:, 3:], clip)
    weights = bias.softmax(-1)
    assert not weights[3:, :3].any() and not weights[:3, :3].triu(1).any()
    assert not bias[:3, 3:].any() and not bias[:3, :3].tril().any()
    (-mask()[0, 1]).backward()
    assert mask.weight.grad[1] < 0


def test_hard_masks_are_lists():
    mask = LearnedMask(5).double()
    torch.nn.init.normal_(mask.weight)
    q, k, v = (double(1, 5, 2, 4) for _ in range(3))
    hard = (mask.visible() > 0.5)[None, None]
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=hard).transpose(1, 2)
    torch.testing.assert_close(block_sparse_attention(q, k, v, mask=mask.block_mask()), expected)
    with pytest.raises(ValueError, match="start=1"):
        LearnedMask(3, start=1.0)


# convolved sequences


def test_a_kernel_of_one_is_multi_head_attention():
    layer, x = ConvolvedAttention(8, num_heads=2, kernels=(1,), groups=1).double(), double(2, 5, 8)
    plain = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([c[0].weight[..., 0] for c in layer.convolutions]))
        plain.in_proj_bias.copy_(torch.cat([c[0].bias for c in layer.convolutions]))
        plain.out_proj.load_state_dict(layer.proj.state_dict())
    torch.testing.assert_close(layer(x), plain(x, x, x)[0])


def test_convolutions_are_mixed_and_follow_a_shift():
    layer, x = ConvolvedAttention(8, num_heads=2, kernels=(1, 3)).double(), double(1, 12, 8)
    torch.nn.init.normal_(layer.mixture)
    convolved = [sum(s * c(x.mT) for s, c in zip(share, made, strict=True)).mT
                 for share, made in zip(layer.mixture.softmax(-1), layer.convolutions, strict=True)]  # fmt: skip
    q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in convolved)
    expected = layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)
    x[:, :2] = x[:, -2:] = 0
    torch.testing.assert_close(layer(x.roll(1, 1))[:, 1:], layer(x)[:, :-1])  # no positions: zeros may move
    with pytest.raises(ValueError, match=r"kernels=\(2,\)"):
        ConvolvedAttention(8, num_heads=2, kernels=(2,))
