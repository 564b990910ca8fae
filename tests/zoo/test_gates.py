"""Gates: what they do to a map, and that they fit into any timm model beside its weights."""

import copy
import pickle

import foveal.zoo  # noqa: F401  registers the models
import pytest
import timm
import torch
from foveal.layers.gates import ELA, GATES, ULSAM, ClassSemanticsGate, PartialChannelGate, PartialSpatialGate
from foveal.zoo.gates import add_gates, gate_names
from torch import nn


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# the gates


def test_ela_scales_by_its_bias_when_it_hears_nothing():
    x = torch.randn(2, 24, 5, 7)
    gate = ELA(24, gn=16)
    nn.init.zeros_(gate.gate[0].weight)
    nn.init.constant_(gate.gate[1].bias, 0.3)
    torch.testing.assert_close(gate(x), x * torch.tensor(0.3).sigmoid() ** 2)
    assert gate.gate[1].num_groups == 8  # the nearest divisor


def test_ela_is_the_same_for_rows_and_columns():
    x = torch.randn(2, 16, 5, 7)
    for groups in ("depthwise", "c8"):
        gate = ELA(16, kernel=5, groups=groups)
        torch.testing.assert_close(gate(x.mT), gate(x).mT)
    other = ELA(16, shared=False)
    assert not torch.allclose(other(x.mT), other(x).mT)


def test_ulsam_adds_attention_of_mass_one():
    x = torch.rand(2, 8, 6, 6).double() + 0.5
    gate = ULSAM(8, groups=2).double().eval()
    gain = (gate(x) / x - 1).flatten(2)
    torch.testing.assert_close(gain.sum(-1), torch.ones_like(gain[..., 0]))
    torch.testing.assert_close(gain[:, 0], gain[:, 3])  # channels of a group share a map
    assert not torch.allclose(gain[:, 0], gain[:, 4])


def test_partial_gates_leave_their_parts_alone():
    x = torch.randn(3, 16, 6, 6)
    for cls in (PartialChannelGate, PartialSpatialGate):
        gate = cls(16).eval()
        changed = torch.cat([x[:, :4], torch.randn(3, 12, 6, 6)], 1)
        torch.testing.assert_close(gate(x)[:, :4], gate(changed)[:, :4])
        changed = torch.cat([torch.randn(3, 4, 6, 6), x[:, 4:]], 1)
        torch.testing.assert_close(gate(x)[:, 4:], gate(changed)[:, 4:])


def test_class_semantics_come_from_the_other_features_alone():
    gate, x, other = ClassSemanticsGate(24, 8), torch.randn(2, 24, 12), torch.randn(2, 8, 12)
    torch.testing.assert_close(gate(x, other), x)
    for p in gate.parameters():
        nn.init.normal_(p)
    torch.testing.assert_close(gate(2 * x, other), 2 * gate(x, other))  # linear in x: the gate does not see it
    still = other.mean(-1, keepdim=True).expand(-1, -1, 12)
    by_time = gate.by_time(still)[..., 2:-2]
    torch.testing.assert_close(by_time, by_time[..., :1].expand_as(by_time))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ELA(8, kernel=4), "kernel"),
        (lambda: ELA(12, groups="c8"), "groups"),
        (lambda: ULSAM(8, groups=3), "groups"),
        (lambda: PartialChannelGate(10), "parts"),
        (lambda: PartialSpatialGate(8, parts=1), "parts"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# in models

MODELS = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4)},
    ),
    "resnet": ("resnet18", {"channels": (16, 16, 16, 16), "layers": (1, 1, 1, 1)}),
    "bottleneck": ("resnet50", {"channels": (8, 8, 8, 8), "layers": (1, 1, 1, 1)}),
    "convnext": ("convnext_atto", {"dims": (16, 16, 16, 24), "depths": (1, 1, 1, 1)}),
    "natten": ("test_natten_dinat", {}),
}


def make(name):
    model, options = MODELS[name]
    return timm.create_model(model, num_classes=5, **options).eval()


def image(name):
    return torch.randn(2, 3, 32, 48 if name == "vit" else 32)


@pytest.mark.parametrize("where", ["block", "stage"])
@pytest.mark.parametrize("name", MODELS)
def test_an_identity_keeps_the_bits(name, where):
    if (name, where) == ("vit", "stage"):
        pytest.skip("a ViT has no stages")
    model, x, seen = make(name), image(name), []

    class Spy(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.channels = channels

        def forward(self, x):
            assert x.shape[1] == self.channels
            seen.append(x.shape)
            return x

    expected = model(x)
    add_gates(model, Spy, where, input_size=tuple(x.shape[1:]))
    assert torch.equal(model(x), expected)
    assert len(seen) == len(gate_names(model)) > 0
    with pytest.raises(ValueError, match="has a gate already"):
        add_gates(model, Spy, where, input_size=tuple(x.shape[1:]))


@pytest.mark.parametrize("gate", [*GATES, "eca"])
@pytest.mark.parametrize("name", ["vit", "swin", "resnet"])
def test_old_weights_load_and_gates_learn(name, gate):
    model, x = make(name), image(name)
    old = model.state_dict()
    add_gates(model, gate, input_size=tuple(x.shape[1:]))
    missing, unexpected = model.load_state_dict(old, strict=False)
    assert missing and not unexpected and all(".added_gate." in key for key in missing)
    model.train()(x).square().sum().backward()
    gates = [p for n, p in model.named_parameters() if ".added_gate." in n]
    assert gates and all(p.grad is not None for p in gates)


@pytest.mark.parametrize("name", ["vit", "bottleneck"])
def test_copies_compiled_and_pickled_models(name):
    model, x = make(name), image(name)
    add_gates(model, "triplet", input_size=tuple(x.shape[1:]))
    model.eval()
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert torch.equal(torch.compile(model, backend="eager")(x), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(model(x), expected)


def test_square_maps_of_other_sizes():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, dynamic_img_size=True
    )
    add_gates(model, "ela", "mlp$").eval()
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 1000)
    with pytest.raises(ValueError, match="square"):
        model(torch.randn(1, 3, 48, 32))


def test_nothing_matches():
    model = make("resnet")
    with pytest.raises(ValueError, match="matches no module"):
        add_gates(model, "ela", "nothing")
    with pytest.raises(ValueError, match="gate='unknown'"):
        add_gates(model, "unknown")
    with pytest.raises(ValueError, match="windows cannot be gated"):
        add_gates(make("swin"), "ela", r"attn$")
    assert not gate_names(model)
