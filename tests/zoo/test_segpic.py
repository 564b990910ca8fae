"""The codec: sizes, bits, regions; and the order of its rates."""

import pytest
import torch
from foveal.layers.regions import GDN, ScaledUp
from foveal.zoo.restoration import RegionCodec
from foveal.zoo.restoration.segpic import means_of
from foveal.zoo.tasks.compression import CompressionTask, jpeg, tones
from torch import nn
from torch.nn import functional as F

ADAM = {"opt": "adam", "lr": 1e-3}
TINY = {"width": 8, "latent": 10, "slices": 2, "sent": 4, "num_heads": 2}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@torch.no_grad()
def test_sizes_and_bits():
    model = RegionCodec(**TINY).eval()
    images = torch.rand(2, 3, 70, 45)
    images[1] = images[0]
    found = model(images)
    assert found.images.shape == images.shape and (found.bits > 0).all()
    torch.testing.assert_close(found.bits[0], found.bits[1])
    torch.testing.assert_close(found.images[0], found.images[1])
    for wrong, message in (((images[:, :1],), "images"), ((images, torch.zeros(2, 70, 44).long()), "regions")):
        with pytest.raises(ValueError, match=f"{message} have shape"):
            model(*wrong)
    with pytest.raises(ValueError, match="slices=3"):
        RegionCodec(**TINY | {"slices": 3})


@torch.no_grad()
def test_regions_of_a_codec():
    """Labels are names; one region is a grid of one cell, but for the enlarged area; each region costs bits."""
    model, images = RegionCodec(**TINY).eval(), torch.rand(1, 3, 64, 64)
    labels = tones(images, 4)
    found = model(images, labels)
    again = model(images, 7 - labels)
    torch.testing.assert_close(again.images, found.images)
    torch.testing.assert_close(again.bits, found.bits)
    x = torch.randn(1, 8, 16, 16)
    one, bits = model.send_means(x, torch.zeros(1, 16, 16).long())
    model.grid = 1
    torch.testing.assert_close(one, model.send_means(x, None)[0], rtol=1e-3, atol=1e-4)
    assert (model.send_means(x, torch.arange(256).view(1, 16, 16) % 3)[1] > bits).all()


def test_means_of_regions():
    x, labels = torch.randn(3, 2, 3), torch.tensor([[5, 5, 2], [2, 9, 9]])
    means, number = means_of(x, labels)
    assert means.shape == (1, 3, 3, 1) and number.tolist() == [1, 1, 0, 0, 2, 2]
    torch.testing.assert_close(means[0, :, 1, 0], x[:, 0, :2].mean(1), rtol=1e-3, atol=1e-3)


def test_everything_learns():
    model = RegionCodec(**TINY)
    found = model(torch.rand(1, 3, 64, 64))
    (found.images.square().sum() + found.bits.sum()).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing, missing


@torch.no_grad()
def test_up_is_a_convolution_between_scales():
    layer, x = ScaledUp(4, 6), torch.randn(1, 4, 5, 7)
    nn.init.zeros_(layer.scales_bias[2].weight)
    nn.init.zeros_(layer.scales_bias[2].bias)
    conv = layer.conv_groups[0]
    expected = F.conv_transpose2d(x, conv.weight, conv.bias, stride=2, padding=2, output_padding=1)
    torch.testing.assert_close(layer(x), GDN(6)(expected))
    assert layer(x).shape == (1, 6, 10, 14)


def test_tones_and_jpeg():
    ramp = torch.linspace(0, 1, 64).expand(2, 3, 30, 64)
    labels = tones(ramp, 4)
    assert labels.shape == (2, 30, 64) and labels[0, 0].unique_consecutive().tolist() == [0, 1, 2, 3]
    few, many = jpeg(torch.rand(3, 40, 40), 1.0), jpeg(torch.rand(3, 40, 40), 6.0)
    assert few[1] < many[1] and few[0] < many[0]
    with pytest.raises(ValueError, match=r"data\.scale=2"):
        CompressionTask(codec={}, scale=2, optimizer=ADAM)
    with pytest.raises(ValueError, match=r"task\.codec"):
        CompressionTask(codec={"breadth": 3}, optimizer=ADAM).make_model()


@pytest.mark.slow
def test_a_larger_rate_gives_more_bits_and_better_images():
    image, points = F.interpolate(torch.rand(1, 3, 8, 8), size=64, mode="bicubic").clamp(0, 1), []
    for rate in (0.0005, 0.02):
        torch.manual_seed(0)
        task = CompressionTask(codec=TINY | {"width": 16}, rate=rate, optimizer=ADAM)
        task.configure_model()
        optimizer = torch.optim.Adam(task.parameters(), 3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            task.training_loss((image, image)).backward()
            nn.utils.clip_grad_norm_(task.parameters(), 1.0)
            optimizer.step()
        task.eval()
        with torch.no_grad():
            found = task.measure(image)
        points.append((found["bpp"], F.mse_loss(found["images"], image)))
    assert points[0][0] < points[1][0] and points[0][1] > points[1][1], points
