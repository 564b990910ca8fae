"""Heads of bags: padding has no effect, order neither; a gate selects; measures of attention."""

import math

import pytest
import torch
from foveal.layers.bags import BAG_HEADS, PackedBagHead, attention_measures


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", BAG_HEADS)
def test_padding_and_order(name):
    head, x = BAG_HEADS[name](6, 3, inner=8).double().eval(), torch.randn(2, 7, 6, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 7:] = False
    plain = head(x, mask=mask[:, :7])
    padded = head(torch.cat([x, torch.full_like(x[:, :2], 1e3)], dim=1), mask=mask)
    turned = head(x.flip(1), mask=mask[:, :7])
    torch.testing.assert_close(padded.logits, plain.logits)
    torch.testing.assert_close(turned.logits, plain.logits)
    torch.testing.assert_close(head(x).logits, plain.logits)
    if plain.attention is not None:
        torch.testing.assert_close(padded.attention[..., :7], plain.attention)
        assert not padded.attention[..., 7:].any()
        torch.testing.assert_close(turned.attention, plain.attention.flip(-1))
        torch.testing.assert_close(plain.attention.sum(-1), torch.ones_like(plain.attention[..., 0]))
    losses = head.train().losses(x, torch.tensor([0, 2]), mask=mask[:, :7])
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("pack", [False, True])
def test_instances_that_are_not_selected_have_no_effect(pack):
    head, x = PackedBagHead(6, 2, inner=8, num_heads=2, pack=pack).double().eval(), torch.randn(1, 12, 6).double()
    with torch.no_grad():
        chosen = head(x).attention[0, 0] > 0
        assert 0 < chosen.sum() < 12
        other = torch.where(chosen[:, None], x, 0.999 * x)
        assert torch.equal(head(other).attention[0, 0] > 0, chosen)
        torch.testing.assert_close(head(other).logits, head(x).logits)
        torch.testing.assert_close(head(x[:, chosen]).logits, head(x).logits)
        head.attention.gate.bias.fill_(-1e3)  # none is selected: the mean of all
        torch.testing.assert_close(head(x).attention, torch.full((1, 1, 12), 1 / 12).double())


def test_marks_teach_the_gate():
    head, x, marks = PackedBagHead(6, 2, inner=8, num_heads=2), torch.randn(2, 5, 6), torch.rand(2, 5) > 0.5
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found = head.losses(x, torch.tensor([0, 1]), mask=mask, marks=marks)
    _, logits = head._run(x, mask)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[mask], marks[mask].float())
    torch.testing.assert_close(found["gate"], expected)
    assert set(head.losses(x, torch.tensor([0, 1]))) == {"bag"}


def test_measures_of_attention():
    mask = torch.tensor([[True] * 40, [True] * 4 + [False] * 36, [True] + [False] * 39])
    weights = mask / mask.sum(1, keepdim=True)
    weights[0] = 0
    weights[0, [3, 7, 9]] = torch.tensor([0.5, 0.25, 0.25])
    entropy, top = attention_measures(weights, mask)
    torch.testing.assert_close(entropy, torch.tensor([1.5 * math.log(2) / math.log(40), 1.0, 0.0]))
    torch.testing.assert_close(top, torch.tensor([0.75, 0.25, 1.0]))
