"""Heads of models: importance, pruning, ranks and latents, on timm's ViT and Swin and on ours."""

from pathlib import Path

import foveal.zoo  # noqa: F401  registers the models
import numpy as np
import pytest
import timm
import torch
from foveal.layers.compressed import CompressedLinear
from foveal.zoo.heads import (
    choose_heads,
    find_attentions,
    head_gates,
    head_importance,
    prune_heads,
    rank_probe,
    to_latent,
)
from foveal.zoo.heads.latent import energy_rank, factors
from torch import nn

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "variants.npz")
MODELS = {
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
    ),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=16,
        depths=(2, 1),
        num_heads=(2, 4),
        num_classes=5,
    ),
    "natten": lambda: timm.create_model("test_natten_dinat", num_classes=5),
}


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    torch.manual_seed(0)
    made = MODELS[request.param]().double().eval()
    with torch.no_grad():  # fresh weights are small: attention would be uniform
        for x in made.parameters():
            x.add_(torch.randn_like(x) * 0.1)
    return made


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2])


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def copy(model):
    import copy

    return copy.deepcopy(model)


def test_gates_of_one_change_nothing(model, batch):
    ones = {site.name: torch.ones(site.heads) for site in find_attentions(model)}
    expected = model(batch[0])
    with head_gates(model, ones):  # the gated copy is contiguous: some processors sum its projection in another order
        torch.testing.assert_close(model(batch[0]), expected, rtol=1e-13, atol=1e-13)
    with pytest.raises(RuntimeError, match="stop"), head_gates(model, ones):
        raise RuntimeError("stop")
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_importance_is_the_derivative_of_a_gate(model, batch):
    found = head_importance(model, [batch], loss)
    site, step = find_attentions(model)[0], 1e-5
    for head in range(site.heads):
        slopes = []
        for sign in (1, -1):
            gate = torch.ones(site.heads, dtype=torch.float64)
            gate[head] += sign * step
            with head_gates(model, {site.name: gate}), torch.no_grad():
                slopes.append(loss(model, batch))
        slope = ((slopes[0] - slopes[1]) / (2 * step)).abs().mean()
        assert found[site.name][head].item() == pytest.approx(slope.item(), rel=1e-4)


def test_a_head_without_output_has_no_importance(model, batch):
    made = copy(model)
    site = max(find_attentions(made), key=lambda site: site.heads)
    with torch.no_grad():
        site.module.proj.weight[:, : site.head_dim] = 0
    for kind in ("gradient", "ablate"):
        found = head_importance(made, [batch], loss, kind=kind)[site.name]
        assert abs(found[0]) < 1e-12 and found[1:].abs().min() > 1e-9
    expected, plan = made(batch[0]), {site.name: list(range(1, site.heads))}
    torch.testing.assert_close(prune_heads(made, plan)(batch[0]), expected, rtol=1e-12, atol=1e-12)


def test_a_pruned_model_is_the_masked_model(model, batch):
    plan = choose_heads(head_importance(model, [batch], loss, kind="leave_one_in"), keep=0.6)
    sites = find_attentions(model)
    assert sum(map(len, plan.values())) == max(len(sites), round(0.6 * sum(s.heads for s in sites)))
    gates = {s.name: torch.tensor([float(h in plan[s.name]) for h in range(s.heads)]) for s in sites}
    with head_gates(model, gates):
        expected = model(batch[0])
    pruned = prune_heads(copy(model), plan)
    torch.testing.assert_close(pruned(batch[0]), expected, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    pruned(batch[0]).sum().backward()


def test_latents(model, batch):
    full = copy(model)
    assert len(to_latent(full, energy=1.0)) == len(find_attentions(model))
    expected = model(batch[0])
    torch.testing.assert_close(full(batch[0]), expected, rtol=1e-9, atol=1e-9)
    errors = []
    for rank in (4, 12):
        made = copy(model)
        to_latent(made, rank=rank)
        errors.append((made(batch[0]) - expected).norm())
        with pytest.raises(ValueError, match="LatentQKV"):
            to_latent(made, rank=rank)
    assert errors[0] > errors[1] > 0
    assert len(rank_probe(full)) == len(rank_probe(model))


def test_ranks(model, batch):
    rows = rank_probe(model, batch[0])
    sites = find_attentions(model)
    assert len(rows) == sum(site.heads for site in sites)
    for row in rows:
        dim = next(site.head_dim for site in sites if site.name == row.name)
        assert 1 <= row.effective <= dim + 1e-6 and 1 <= row.stable <= dim and 1 <= row.energy <= dim
        assert row.logits is not None and 1 <= row.logits <= dim + 1e-6 and row.weights >= 1
    made = copy(model)
    site = find_attentions(made)[0]
    with torch.no_grad():
        site.module.qkv.weight[1 : site.head_dim] = 0  # queries of head 0 have one channel left
    assert rank_probe(made)[0].effective == pytest.approx(1)


def test_factors_recorded():
    z = {k.split("/")[1]: torch.from_numpy(GOLDENS[k]) for k in GOLDENS if k.startswith("mla_svd/")}
    up, down, singular = factors(z["kv"], rank=8)
    torch.testing.assert_close((up @ down).float(), z["rank8"], rtol=0, atol=1e-5)
    torch.testing.assert_close(singular.float(), z["sigma"], rtol=1e-5, atol=1e-5)
    assert energy_rank(singular, 0.9) == z["rank_energy09"]
    error = (z["kv"] - up @ down).square().sum()
    torch.testing.assert_close(error, singular[8:].square().sum())


def test_wrong_plans(model):
    name, heads = find_attentions(model)[0].name, find_attentions(model)[0].heads
    for plan in ({"nothing": [0]}, {name: []}, {name: [0, 0]}, {name: [heads]}):
        with pytest.raises(ValueError, match="plan"):
            prune_heads(model, plan)
    with pytest.raises(ValueError, match="no attention"):
        find_attentions(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="rank"):
        to_latent(model, rank=4, energy=0.5)


# a linear layer with a compressed input


def gradients(layer, x, grad):
    x = x.clone().requires_grad_()
    out = layer(x)
    return out, torch.autograd.grad(out, (x, layer.weight, layer.bias), grad)


def test_compressed_linear_is_exact_with_all_rows_or_rank_one():
    torch.manual_seed(0)
    plain = nn.Linear(6, 5).double()
    for ratio, x in (
        (1.0, torch.randn(3, 4, 6, dtype=torch.float64)),
        (0.01, torch.randn(3, 4, 1, dtype=torch.float64) * torch.randn(6, dtype=torch.float64)),
    ):
        layer = CompressedLinear(6, 5, ratio=ratio).double()
        layer.load_state_dict(plain.state_dict())
        grad = torch.randn(3, 4, 5, dtype=torch.float64)
        (out, found), (expected_out, expected) = gradients(layer, x, grad), gradients(plain, x, grad)
        assert torch.equal(out, expected_out)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_compressed_gradients_point_the_right_way():
    torch.manual_seed(0)
    x, grad = torch.randn(512, 16) + 1, torch.randn(512, 8)
    layer, cosines = CompressedLinear(16, 8, ratio=1 / 16), []
    exact = grad.T @ x
    for tolerance in (float("inf"), 0.7):
        layer.tolerance = tolerance
        (dx, dw, db) = gradients(layer, x, grad)[1]
        torch.testing.assert_close(dx, grad @ layer.weight)
        torch.testing.assert_close(db, grad.sum(0))
        cosines.append(nn.functional.cosine_similarity(dw.flatten(), exact.flatten(), dim=0).item())
    assert min(cosines) > 0.5


def test_compressed_layers_in_a_model():
    model = MODELS["vit"]()
    keys = list(model.state_dict())
    assert CompressedLinear.replace(model, ratio=0.1) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert list(model.state_dict()) == keys
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(x.grad is not None for x in model.parameters())
    with pytest.raises(ValueError, match="matches no linear layer"):
        CompressedLinear.replace(model, "nothing")
    with pytest.raises(ValueError, match="ratio"):
        CompressedLinear(4, 4, ratio=0)
