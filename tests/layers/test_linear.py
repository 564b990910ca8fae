"""The layers of L2ViT against their definitions and a recorded output."""

from pathlib import Path

import numpy as np
import pytest
import torch
from foveal.layers import LinearAttention, LocalConcentration
from golden_weights import image_a, load_synthetic


def test_linear_attention_is_its_definition():
    torch.manual_seed(0)
    layer = LinearAttention(12, num_heads=3, floor=2.0).double()
    assert torch.equal(layer.temperature, torch.full((3, 1, 1), 0.5, dtype=torch.float64))
    torch.nn.init.normal_(layer.temperature)
    x = torch.randn(2, 5, 4, 12, dtype=torch.float64)
    q, k, v = layer.qkv(x.flatten(1, 2)).view(2, 20, 3, 3, 4).permute(2, 0, 3, 1, 4)
    q, k = q.relu(), k.relu()
    denominator = (q @ k.mT).sum(-1, keepdim=True)
    assert (denominator > 2).any() and (denominator < 2).any()
    out = q @ (k.mT @ v * layer.temperature) / denominator.clamp(min=2.0)
    expected = layer.proj(out.transpose(1, 2).reshape(2, 5, 4, 12))
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 3, 5)])
def test_linear_attention_takes_any_grid(shape):
    layer = LinearAttention(8, num_heads=2)
    x = torch.randn(2, *shape, 8)
    out = layer(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out.flatten(1, -2), layer(x.flatten(1, -2)))
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_local_concentration_is_the_official_one():
    layer = load_synthetic(LocalConcentration(64), "hot")
    with torch.inference_mode():
        out = layer(image_a((2, 196, 64)).view(2, 14, 14, 64))
    recorded = np.load(Path(__file__).parents[1] / "goldens" / "l2vit_t.npz")["local_concentration"]
    np.testing.assert_allclose(out.flatten()[::20].numpy(), recorded, rtol=0, atol=5e-6)


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="dim=10 must be a multiple of num_heads=3"):
        LinearAttention(10, num_heads=3)
    with pytest.raises(ValueError, match=r"x has shape \(1, 4, 6\); expected \[B, \*spatial, 8\]"):
        LinearAttention(8, num_heads=2)(torch.zeros(1, 4, 6))
    with pytest.raises(ValueError, match="kernel_size=4 must be odd"):
        LocalConcentration(8, kernel_size=4)
    with pytest.raises(NotImplementedError, match="TorchScript cannot compile LinearAttention"):
        torch.jit.script(LinearAttention(8, num_heads=2))
