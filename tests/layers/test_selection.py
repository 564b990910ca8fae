"""Select and pack: what selected tokens compute, what the others keep, and what teaches the gate."""

import copy

import foveal.zoo  # noqa: F401
import pytest
import timm
import torch
from foveal.layers import DenseAttention2d, SelectAndPackAttention2d, selection_loss
from torch import nn

DD = {"dtype": torch.float64}


def test_a_model_starts_with_the_share_of_tokens_that_is_asked_for():
    model = timm.create_model("test_spa", gate_bias=3.0)
    gates = [m.gate.bias for m in model.modules() if isinstance(m, SelectAndPackAttention2d)]
    assert len(gates) == 3 and all(bias.item() == 3 for bias in gates)
    torch.manual_seed(0)
    plain = nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 1)
    torch.manual_seed(0)
    assert torch.equal(SelectAndPackAttention2d(12, num_heads=2).gate.bias, plain[2].bias)  # as torch made it


def make(gate_bias: float = 0.0, **options) -> SelectAndPackAttention2d:
    torch.manual_seed(0)
    layer = SelectAndPackAttention2d(12, num_heads=2, **options, **DD)
    nn.init.constant_(layer.gate.bias, gate_bias)
    return layer.eval()


def draw(*size: int) -> torch.Tensor:
    return torch.randn(*size, **DD, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pack", [False, True])
def test_selected_tokens_attend_to_each_other_and_the_others_pass(pack):
    layer, x = make(pack=pack), draw(3, 4, 5, 12)
    with torch.no_grad():
        x[2] -= 30 * layer.gate.weight[0]  # an image of which no token is selected
    out, tokens = layer(x).flatten(1, 2), x.flatten(1, 2)
    chosen = layer.gate(tokens)[..., 0] > 0
    assert chosen.any(1).tolist() == [True, True, False] and not chosen[:2].all()
    assert torch.equal((tokens + out)[~chosen], tokens[~chosen])
    for i in range(2):
        query, key, value = layer.qkv(tokens[i, chosen[i]]).view(-1, 3, 2, 6).unbind(1)
        weights = (torch.einsum("qhd,khd->hqk", query, key) * 6**-0.5).softmax(-1)
        expected = layer.proj(torch.einsum("hqk,khd->qhd", weights, value).flatten(1))
        torch.testing.assert_close(out[i, chosen[i]], expected)
    torch.testing.assert_close(layer(x.flip(0)).flip(0).flatten(1, 2), out)


@pytest.mark.parametrize("pack", [False, True])
def test_all_tokens_selected_are_plain_attention(pack):
    layer, x = make(gate_bias=100.0, pack=pack), draw(2, 4, 5, 12)
    plain = DenseAttention2d(12, num_heads=2, **DD)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("gate")})
    torch.testing.assert_close(layer(x), plain(x))


def test_packed_training_has_the_same_gradients():
    x, found = draw(3, 4, 5, 12), []
    for pack in (False, True):
        layer = make(pack=pack).train()
        torch.manual_seed(2)  # of the choice
        found.append(torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())))
    for masked, packed in zip(*found, strict=True):
        assert masked.abs().max() > 0
        torch.testing.assert_close(packed, masked)


def test_tokens_are_selected_as_often_as_the_sigmoid_says_and_gradients_are_its_own():
    layer = make().train()
    logits = torch.tensor([[-2.0, 0.0, 1.0]], **DD).expand(40_000, 3).clone().requires_grad_()
    torch.manual_seed(0)
    chosen, weight = layer.select(logits)
    assert torch.equal(weight, chosen.to(weight))
    # five standard deviations of a share of 40,000 draws
    torch.testing.assert_close(chosen.double().mean(0), logits[0].sigmoid().detach(), rtol=0, atol=0.0125)
    (slope,) = torch.autograd.grad(weight.sum(), logits)
    assert (slope > 0).all() and (slope <= 0.25).all() and slope.std() > 0
    still = layer.eval().select(logits)[1]
    (slope,) = torch.autograd.grad(still.sum(), logits)
    soft = logits.sigmoid()
    torch.testing.assert_close(slope, soft * (1 - soft))


def test_the_gate_learns_where_objects_are():
    layer, masks = make(gate_bias=0.5).train(), torch.zeros(2, 8, 10)
    masks[0, 0, 9] = masks[1, 7, 2:5] = 1  # one cell of 2x2 is touched at a corner, two at the lower edge
    wanted = torch.zeros(2, 4, 5, **DD)
    wanted[0, 0, 4] = wanted[1, 3, 1] = wanted[1, 3, 2] = 1
    model = nn.Sequential(layer, copy.deepcopy(layer))
    x = draw(2, 4, 5, 12)
    logits = layer.gate(x)[..., 0]
    model(x)
    second = model[1].logits
    expected = sum(
        -(wanted * z.sigmoid().log() + (1 - wanted) * (1 - z.sigmoid()).log()).mean() for z in (logits, second)
    )
    torch.testing.assert_close(selection_loss(model, masks), expected)
    selection_loss(model, masks).backward()
    assert layer.gate.weight.grad.abs().max() > 0
    assert copy.deepcopy(model)[0].logits is None
    with pytest.raises(ValueError, match=r"masks.shape=\(1, 8, 10\) must be \[2, H, W\]"):
        selection_loss(model, masks[:1])
    with pytest.raises(ValueError, match="run it in training first"):
        selection_loss(make(), masks)
    with pytest.raises(ValueError, match=r"expected \[B, H, W, 12\]"):
        layer(x[..., :3])
