"""Heads on tokens: official recordings and the properties that define them."""

import pytest
import torch
from foveal.layers.bottleneck import BottleneckAttention
from foveal.layers.cross import pairwise_cross_attention, rollout_row, strongest_tokens
from foveal.layers.pooling import BagHead, EfficientPooling, TokenHead
from recorded_modules import fill, noise, recorded
from torch.nn import functional as F

EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# attentive probes


def test_efficient_pooling_recorded():
    pool, x = fill(EfficientPooling(64, queries=4).double()), noise((2, 16, 64), 1)
    found, weights = pool(x)
    torch.testing.assert_close(found, recorded("ep_q4_d1")["y"], **EXACT)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4).double())
    order = torch.randperm(16)
    torch.testing.assert_close(pool(x[:, order])[0], found)


def test_each_query_pools_its_own_channels():
    pool, x = fill(EfficientPooling(24, queries=3, d_out=2).double()), noise((2, 5, 24), 1)
    found, _ = pool(x)
    assert found.shape == (2, 12)
    (grad,) = torch.autograd.grad(found[:, 4:8].sum(), pool.cls_token)
    assert grad[0, 1].abs().sum() > 0 and grad[0, [0, 2]].abs().sum() == 0
    with torch.no_grad():
        pool.cls_token.copy_(pool.cls_token[:, :1].expand(-1, 3, -1))
    one, weights = pool(x)
    torch.testing.assert_close(one, pool.v(weights[:, :1] @ x)[:, 0])


def test_the_head_standardises_without_parameters():
    head = TokenHead(16, 5, pool="ep", queries=4)
    assert head.norm.weight is None and head.norm.eps == 1e-6
    out = head(torch.randn(8, 7, 16))
    assert out.logits.shape == (8, 5) and out.attention.shape == (8, 4, 7)
    both, tokens, prefix = TokenHead(16, 5, tokens="both").eval(), torch.randn(2, 7, 16), torch.randn(2, 3, 16)
    mean = torch.cat([prefix[:, :1], tokens], 1).mean(1)
    torch.testing.assert_close(both(tokens, prefix).logits, both.fc(both.norm(mean)))
    with pytest.raises(ValueError, match="class token"):
        both(tokens)
    for options, message in (
        ({"pool": "max"}, "pool"),
        ({"tokens": "all"}, "tokens"),
        ({"pool": "ep", "queries": 5}, "queries"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenHead(16, 5, **options)


# bags


def test_bags_recorded():
    z, head = recorded("acmil_ga"), fill(BagHead(48, 3, inner=32, hidden=16).double())
    x = noise((1, 40, 48), 2)
    each, whole, weights = head.branches(x)
    torch.testing.assert_close(each[0], z["sub"], **EXACT)
    torch.testing.assert_close(whole, z["slide"], **EXACT)
    torch.testing.assert_close(weights, z["attention_logits"].softmax(-1), **EXACT)
    losses = head.losses(x, torch.tensor([1]))
    for ours, theirs in (("bag", "loss_slide"), ("branches", "loss_sub"), ("diversity", "loss_diff")):
        torch.testing.assert_close(losses[ours], z[theirs], **EXACT)


def test_instances_have_no_order_and_padding_no_effect():
    head, x = BagHead(8, 3, inner=8, hidden=4).eval(), torch.randn(2, 9, 8)
    order = torch.randperm(9)
    out, moved = head(x), head(x[:, order])
    torch.testing.assert_close(moved.logits, out.logits)
    torch.testing.assert_close(moved.attention, out.attention[:, :, order])
    padded = torch.cat([x, torch.randn(2, 4, 8)], 1)
    mask = torch.arange(13) < 9
    torch.testing.assert_close(head(padded, mask=mask.expand(2, -1)).logits, out.logits)


def test_strongest_instances_are_masked_in_training():
    head, logits = BagHead(8, 3, mask_top=10, mask_ratio=0.6), torch.randn(2, 5, 40)
    masked = head.mask_strongest(logits)
    gone = masked == -1e9
    assert (gone.sum(-1) == 6).all()
    assert (logits[gone].view(2, 5, 6) >= logits.topk(10, -1).values[..., -1:]).all()
    assert torch.equal(masked[~gone], logits[~gone])
    x = torch.randn(1, 40, 8)
    assert torch.equal(head.eval()(x).logits, head(x).logits)


def test_diversity_is_the_likeness_of_branches():
    head, x, target = BagHead(4, 2, inner=4, hidden=4, branches=2), torch.randn(1, 6, 4), torch.tensor([0])
    with torch.no_grad():
        for p in head.attention.attention_weights.parameters():
            p.copy_(p[:1].expand_as(p))
    assert head.losses(x, target)["diversity"].item() == pytest.approx(1)
    assert set(BagHead(4, 2, branches=1).losses(x, target)) == {"bag"}  # ABMIL
    with pytest.raises(ValueError, match="branches"):
        BagHead(4, 2, branches=0)


# interventions


def test_bottleneck_recorded():
    z, layer = recorded("tab_attention"), fill(BottleneckAttention(32).double())
    out, weights = layer(noise((10, 2, 32), 20).transpose(0, 1))
    torch.testing.assert_close(out.transpose(0, 1), z["y"], **EXACT)
    torch.testing.assert_close(weights, z["attention"], **EXACT)


def test_attention_on_the_class_token_alone_is_an_answer_without_images():
    layer = BottleneckAttention(16)
    one = F.one_hot(torch.tensor([0, 0]), 6).float()
    rows = [layer(torch.randn(2, 5, 16), torch.randn(2, 6, 16), override=one)[0][:, 0] for _ in range(2)]
    assert torch.equal(*rows) and torch.equal(rows[0], layer.attn.out_proj.bias.expand(2, -1))
    x, y = torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    plain, weights = layer(x, y)
    same, shown = layer(x, y, override=lambda row: row)
    assert torch.equal(same, plain) and torch.equal(shown, weights)
    assert not torch.allclose(layer(x, y, override=lambda row: row.flip(-1))[0], plain)
    with pytest.raises(ValueError, match="override"):
        layer(x, y, override=one[:, :5])


# DCAL


def test_rollout_row_is_the_row_of_the_product():
    qs, ks = ([torch.randn(2, 3, 7, 4).double() for _ in range(4)] for _ in range(2))
    product = torch.eye(7).double().expand(2, 7, 7)
    for q, k in zip(qs, ks, strict=True):
        product = (((q @ k.mT) / 2).softmax(-1).mean(1) + torch.eye(7)) / 2 @ product
    row = rollout_row(qs, ks)
    torch.testing.assert_close(row, product[:, 0])
    torch.testing.assert_close(row.sum(-1), torch.ones(2).double())
    chosen = strongest_tokens(row, 0.5)
    assert (chosen[:, 0] == 0).all() and chosen.shape == (2, 4)
    assert torch.equal(chosen[:, 1:] - 1, row[:, 1:].topk(3).indices)
    assert strongest_tokens(row, 1.0).sort().values.tolist() == [list(range(7))] * 2
    with pytest.raises(ValueError, match="ratio"):
        strongest_tokens(row, 0)


def test_a_partner_that_is_oneself_changes_nothing():
    q, k, v = (torch.randn(3, 2, 5, 4).double() for _ in range(3))
    torch.testing.assert_close(
        pairwise_cross_attention(q, k, v, torch.arange(3)), F.scaled_dot_product_attention(q, k, v)
    )
    other = pairwise_cross_attention(q, k, v, torch.tensor([1, 2, 0]))
    wide = torch.cat([k, k[[1, 2, 0]]], 2)
    expected = ((q @ wide.mT) / 2).softmax(-1) @ torch.cat([v, v[[1, 2, 0]]], 2)
    torch.testing.assert_close(other, expected)
