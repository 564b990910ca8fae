"""The network of style transfer: sizes, weights of other people's encoders, targets without parameters."""

import pytest
import timm
import torch
from foveal.layers.style import AllToKeyAttention
from foveal.zoo.data.styles import PhotoStyles
from foveal.zoo.restoration import StyleTransfer
from foveal.zoo.restoration.stya2k import StyleEncoder, content_distance, plain_attention, style_distance
from foveal.zoo.tasks.style import StyleTask
from torch import nn

ADAM = {"opt": "adam", "lr": 1e-3}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@torch.no_grad()
def test_sizes():
    model = StyleTransfer(width=8)
    content, style = torch.rand(1, 3, 70, 90), torch.rand(1, 3, 50, 130)
    found = model(content, style)
    assert found.shape == content.shape and not torch.allclose(found, model(content, style.flip(1)))
    assert [x.shape[1:] for x in model.encoder(torch.rand(1, 3, 64, 32))] == [
        (8, 64, 32), (16, 32, 16), (32, 16, 8), (64, 8, 4), (64, 4, 2)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="batches of images"):
        model(content, style[:, :1])
    with pytest.raises(ValueError, match="num_heads"):
        StyleTransfer(width=8, num_heads=5)


def test_the_encoder_is_vgg_19():
    with torch.device("meta"):
        theirs, ours = timm.create_model("vgg19", num_classes=0).state_dict(), StyleEncoder().state_dict()
    assert {n: x.shape for n, x in ours.items()}.items() <= {n: x.shape for n, x in theirs.items()}.items()
    encoder, other = StyleEncoder(width=4), StyleEncoder(width=4, seed=1)
    assert not any(p.requires_grad for p in encoder.parameters())
    encoder.fill(other.state_dict() | {"classifier.weight": torch.ones(2)})
    x = torch.rand(1, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(encoder(x), other(x), strict=True))
    with pytest.raises(ValueError, match=r"'features\.0\.bias' is missing or of another shape"):
        encoder.fill(StyleEncoder(width=2).state_dict())


def test_random_features_follow_from_the_seed_alone():
    torch.manual_seed(5)
    one, two = (StyleEncoder(width=4, seed=n).state_dict() for n in (0, 0))
    assert all(torch.equal(one[n], two[n]) for n in one)


@torch.no_grad()
def test_attention_without_parameters():
    """Half of that of a layer whose matrices are identities, but for the residual."""
    layer, (content, style) = AllToKeyAttention(8, num_heads=2, region=4), torch.randn(2, 1, 8, 12, 12)
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight)
            nn.init.zeros_(module.bias)
    found = plain_attention(content, style, num_heads=2, region=4)
    torch.testing.assert_close(2 * found + content, layer(content, style))


def test_what_learns_and_what_is_measured():
    task = StyleTask(network={"width": 8}, optimizer=ADAM)
    task.configure_model()
    content, style = torch.rand(2, 1, 3, 64, 64)
    task.measure((content, style))["loss"].backward()
    still = {n for n, p in task.model.named_parameters() if p.grad is None}
    assert still == {n for n, p in task.model.named_parameters() if n.startswith("encoder.")}
    given, wanted = task.model.encoder(content), task.model.encoder(style)
    assert style_distance(wanted, wanted) == content_distance(given, given) == 0 < style_distance(given, wanted)
    with pytest.raises(ValueError, match=r"task\.network"):
        StyleTask(network={"breadth": 8}, optimizer=ADAM).make_model()


def test_encoder_weights(tmp_path):
    torch.save(StyleEncoder(width=8, seed=3).state_dict(), tmp_path / "vgg.pth")
    options = {"encoder_weights": str(tmp_path / "vgg.pth"), "optimizer": ADAM}
    model = StyleTask(network={"width": 8}, **options).make_model()
    assert torch.equal(model.encoder.features[0].weight, StyleEncoder(width=8, seed=3).features[0].weight)
    with pytest.raises(ValueError, match=r"task\.encoder_weights=.*vgg\.pth.*of another shape"):
        StyleTask(network={"width": 4}, **options).make_model()


def test_pairs():
    data = [PhotoStyles(seed=s, crop=64, epoch_length=4) for s in (0, 0, 1)]
    batches = []
    for x in data:
        x.setup()
        batches.append(next(iter(x.train_dataloader())))
    assert batches[0][0].shape == batches[0][1].shape == (4, 3, 64, 64)
    assert torch.equal(batches[0][0], batches[1][0]) and not torch.equal(batches[0][0], batches[2][0])
    assert torch.equal(data[0].datasets["test"][3][0], data[2].datasets["test"][3][0])
    with pytest.raises(ValueError, match=r"data\.crop=100"):
        PhotoStyles(crop=100)
