"""Probes of frozen models, neighbours, and localization by a spatial token."""

import foveal.zoo  # noqa: F401  registers the models
import pytest
import timm
import torch
from foveal.zoo.heads.attach import attach_head, predict_by_neighbors, tokens_of
from foveal.zoo.heads.few_labels import few_label_accuracy
from foveal.zoo.heads.localization import SpatialTokenViT, box_of
from foveal.zoo.heads.paired import PairedViT
from recorded_modules import fill, noise, recorded

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}


def vit(**options):
    return timm.create_model("vit_tiny_patch16_224", **VIT | options)


@pytest.mark.parametrize("name", ["vit", "swin", "natten"])
def test_a_frozen_trunk_stays_as_it_is(name):
    torch.manual_seed(0)
    swin = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "num_classes": 0}
    trunk = {
        "vit": lambda: vit(drop_path_rate=0.5),
        "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.5, **swin),
        "natten": lambda: timm.create_model("test_natten_dinat", num_classes=0),
    }[name]()
    probe = attach_head(trunk, "ep", 5, queries=4).train()
    assert not trunk.training and probe.head.training
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(probe.features(x)[0], probe.features(x)[0])
    probe(x).sum().backward()
    assert all(p.grad is None for p in trunk.parameters()) and all(p.grad is not None for p in probe.head.parameters())
    assert probe.output(x).attention.shape[:2] == (4, 4)
    tuned = attach_head(trunk, "linear", 5, freeze=False).train()
    trunk.requires_grad_(True)
    assert trunk.training
    tuned(x).square().sum().backward()
    assert any(p.grad is not None for p in trunk.parameters())


def test_layers_and_tokens():
    trunk = vit().eval()
    x = torch.randn(2, 3, 32, 32)
    last, prefix = tokens_of(trunk, x)
    torch.testing.assert_close(torch.cat([prefix, last], 1), trunk.forward_features(x))
    early, _ = tokens_of(trunk, x, layer=0, norm=False)
    with torch.no_grad():
        trunk.blocks[2].mlp.fc1.weight.zero_()
    assert torch.equal(tokens_of(trunk, x, layer=0, norm=False)[0], early)
    probe = attach_head(trunk, "linear", 3, tokens="cls").eval()
    torch.testing.assert_close(probe(x), probe.head.fc(probe.head.norm(tokens_of(trunk, x)[1][:, 0])))
    with pytest.raises(ValueError, match="layer=3"):
        tokens_of(trunk, x, layer=3)
    with pytest.raises(ValueError, match="forward_intermediates"):
        tokens_of(torch.nn.Linear(2, 2), x)


def test_neighbours():
    torch.manual_seed(0)
    centers = torch.eye(3).repeat_interleave(10, 0)
    memory, labels = centers + 0.1 * torch.randn(30, 3), torch.arange(3).repeat_interleave(10)
    votes = predict_by_neighbors(5 * torch.eye(3), memory, labels, 3, k=8)
    assert votes.argmax(-1).tolist() == [0, 1, 2]
    assert predict_by_neighbors(memory, memory, labels, 3, k=1).argmax(-1).equal(labels)
    assert predict_by_neighbors(memory[:1], memory, labels, 3, k=99).shape == (1, 3)


# localization


def test_few_labels():
    torch.manual_seed(0)
    labels = torch.arange(60) % 3 + 4
    clear = torch.nn.functional.one_hot(labels - 4) + 0.01 * torch.randn(60, 3)
    assert few_label_accuracy(clear, labels).eq(1).all()
    vague = torch.randn(300, 8), torch.arange(300) % 3
    found = few_label_accuracy(*vague, shots=5, draws=30)
    assert found.shape == (30,) and abs(found.mean() - 1 / 3) < 0.03
    assert torch.equal(found, few_label_accuracy(*vague, shots=5, draws=30))
    half = clear + torch.randn(60, 3)
    accuracies = [few_label_accuracy(half, labels, shots=shots).mean() for shots in (1, 5, 15)]
    assert accuracies == sorted(accuracies)  # more labels, fewer mistakes
    for wrong in ({"shots": 20}, {"labels": torch.zeros(60, dtype=torch.long)}):
        with pytest.raises(ValueError, match="shots="):
            few_label_accuracy(clear, **({"labels": labels} | wrong))


def test_spatial_token_recorded():
    trunk = timm.create_model("vit_tiny_patch16_224", embed_dim=32, num_heads=4, num_classes=0)
    model = SpatialTokenViT(trunk, 7, area=0.25).double()
    kernel = model.weight.clone()
    fill(model)
    model.weight.copy_(kernel)
    z = recorded("sat_dim32")
    with torch.no_grad():
        out = model(noise((2, 3, 224, 224), 3))
    exact = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(out.logits, z["logits"], **exact)
    torch.testing.assert_close(out.map, z["mask"], **exact)
    torch.testing.assert_close(out.map.mean((1, 2)), z["area"], **exact)
    smooth = model.smooth(out.map)
    torch.testing.assert_close(((1 - smooth) * smooth).mean((1, 2)), z["normalization"], **exact)
    losses = model.losses(out, torch.tensor([0, 1]))
    torch.testing.assert_close(losses["area"], (z["area"].mean() - 0.25).abs(), **exact)


def test_without_scaling_the_token_is_one_of_the_prefix():
    trunk = vit().double().eval()
    model = SpatialTokenViT(trunk, 5, scaled=0).double().eval()
    x = torch.randn(2, 3, 32, 32).double()
    tokens = trunk.patch_embed(x)
    tokens = torch.cat([trunk.cls_token.expand(2, -1, -1), tokens], 1) + trunk.pos_embed
    tokens = torch.cat([tokens, (model.loc_token + model.loc_embed).expand(2, -1, -1)], 1)
    tokens = trunk.norm(trunk.blocks(tokens))[:, 1:-1]
    expected = model.head(tokens.mT.unflatten(2, (4, 4))).mean((2, 3))
    out = model(x)
    torch.testing.assert_close(out.logits, expected)
    assert (out.map == 1).all()


def test_spatial_tokens_learn():
    model = SpatialTokenViT(vit(), 5)
    out = model(torch.randn(2, 3, 32, 32))
    sum(model.losses(out, torch.tensor([0, 1])).values()).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing and out.map.shape == (2, 4, 4)
    with pytest.raises(ValueError, match="scaled"):
        SpatialTokenViT(vit(), 5, scaled=4)
    with pytest.raises(ValueError, match="expected timm"):
        SpatialTokenViT(torch.nn.Linear(2, 2), 5)


def test_boxes():
    found = torch.zeros(8, 8)
    found[2:5, 3:7] = 1.0
    found[7, 0] = 0.9
    assert box_of(found) == (3, 2, 7, 5)
    left, top, right, bottom = box_of(found, size=(32, 32))
    assert abs(left - 12) <= 2 and abs(top - 8) <= 2 and abs(right - 28) <= 2 and abs(bottom - 20) <= 2
    assert box_of(torch.ones(4, 6)) == (0, 0, 6, 4)


# pairs of images and salient patches


def test_an_image_that_is_its_own_partner_distracts_nobody():
    model, x = PairedViT(vit().double(), 5).eval(), torch.randn(3, 3, 32, 32).double()
    out = model(x, torch.arange(3))
    torch.testing.assert_close(out.paired, out.whole, rtol=1e-10, atol=1e-10)
    other = model(x, torch.tensor([1, 2, 0])).paired
    assert (other - out.whole).abs().max() > 1e-3
    assert model(x).paired is None
    torch.testing.assert_close(model.predict(x), (out.whole.softmax(-1) + out.local.softmax(-1)) / 2)


def test_with_all_patches_the_local_branch_is_one_more_block():
    trunk, x = vit().double().eval(), torch.randn(2, 3, 32, 32).double()
    features = trunk.blocks(trunk._pos_embed(trunk.patch_embed(x)))
    model = PairedViT(trunk, 5, ratio=1.0).eval()
    whole = model.local_head(model.local_norm(model.local_block(features))[:, 0])
    torch.testing.assert_close(model(x).local, whole)
    torch.testing.assert_close(model(x).whole, model.head(trunk.norm(features)[:, 0]))
    model.ratio = 0.25  # the class token's result depends on the keys alone, of which all are there
    torch.testing.assert_close(model(x).local, whole)


def test_losses_of_branches_are_weighed_by_what_is_learnt():
    model, x, target = PairedViT(vit(), 5), torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    out = model(x, torch.tensor([1, 2, 3, 0]))
    terms = [torch.nn.functional.cross_entropy(y, target) for y in out]
    loss = model.loss(out, target)
    torch.testing.assert_close(loss, sum(terms) / 2)
    loss.backward()
    torch.testing.assert_close(model.log_variances.grad, torch.stack([(1 - t) / 2 for t in terms]).detach())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="ratio=0 must lie"):
        PairedViT(vit(), 5, ratio=0)
