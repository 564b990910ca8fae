"""Regions and style: official recordings, and what regions and keys mean."""

import numpy as np
import pytest
import torch
from foveal.layers.regions import GDN, RegionTransform, ScaledDown, apply_kernels, region_attention, region_means
from foveal.layers.style import AllToKeyAttention, ManifoldAlignment, from_regions, to_regions
from recorded_modules import FOLDER as GOLDENS
from recorded_modules import fill, noise, recorded
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_tokens_of_different_regions_do_not_meet():
    q, k, v = (torch.randn(2, 2, 12, 4, dtype=torch.float64) for _ in range(3))
    regions = torch.randint(0, 3, (2, 12))
    found = region_attention(q, k, v, regions, scale=0.7)
    same = regions[:, None, :, None] == regions[:, None, None, :]
    expected = (q @ k.mT * 0.7).masked_fill(~same, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(region_attention(q, k, v, 7 - regions, scale=0.7), found)  # numbers do not matter
    v2 = torch.where((regions == 2)[:, None, :, None], torch.randn_like(v), v)
    changed = region_attention(q, k, v2, regions, scale=0.7)
    kept = (regions != 2)[:, None, :, None].expand_as(v)
    assert torch.equal(changed[kept], found[kept])
    whole = region_attention(q, k, v, torch.zeros_like(regions), scale=0.5)
    torch.testing.assert_close(whole, F.scaled_dot_product_attention(q, k, v))
    with pytest.raises(ValueError, match="regions"):
        region_attention(q, k, v, regions[:, :5], scale=1.0)
    given = [x[:1, :, :5].clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: region_attention(*x, regions[:1, :5], scale=0.7), given)


def test_region_transform_recorded():
    layer, x = fill(RegionTransform(12).double()), noise((2, 12, 8, 8), 13)
    regions = torch.from_numpy(np.random.RandomState(14).randint(0, 3, (2, 8, 8)))
    z = recorded("segpic_region_transform")
    means = layer.centers(x, regions)
    for image in range(2):
        each = torch.stack([means[image][:, regions[image] == i][:, 0] for i in range(3)])
        torch.testing.assert_close(each, z[f"centres{image}"], rtol=1e-7, atol=1e-7)  # areas in float32 there
    torch.testing.assert_close(layer(x, regions), z["y"], rtol=1e-7, atol=1e-7)


def test_region_transform_properties():
    layer, x = RegionTransform(4).double(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    one = torch.zeros(2, 8, 8).long()
    cells = RegionTransform(4, grid=1).double()
    cells.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, one), cells(x), rtol=1e-4, atol=1e-5)  # but for the enlarged area
    blur = apply_kernels(x, torch.full((2, 4, 9, 8, 8), 1 / 9, dtype=torch.float64))
    torch.testing.assert_close(blur, F.avg_pool2d(x, 3, 1, 1))
    constant = region_means(torch.ones_like(x), torch.randint(0, 3, (2, 8, 8)))
    assert (constant - 1).abs().max() < 1e-3


def test_scaled_down_recorded():
    layer = fill(ScaledDown(3, 8).double(), keep=("conv_groups.1",))
    found = layer(noise((1, 3, 16, 16), 15))
    torch.testing.assert_close(found, recorded("segpic_down_sal")["y"], rtol=1e-7, atol=1e-7)  # pedestal in float32
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(GDN(8)(x), x / (1 + 0.1 * x**2).sqrt())


def test_all_to_key_recorded():
    layer = fill(AllToKeyAttention(16).double())
    found = layer(noise((1, 16, 32, 32), 17), 1.5 * noise((1, 16, 32, 32), 18) + 0.3)
    torch.testing.assert_close(found[..., ::3, ::3].float(), recorded("a2k_layer4")["y"], rtol=1e-6, atol=1e-6)


def test_all_to_key_properties():
    layer = fill(AllToKeyAttention(16, num_heads=2, region=4).double())
    content, style = noise((1, 16, 12, 12), 1), noise((1, 16, 12, 12), 2)
    q, k, v = (to_regions(x, 2, 4) for x in (content, style, noise((1, 16, 12, 12), 3)))
    torch.testing.assert_close(from_regions(q, (12, 12)), content)
    order = torch.randperm(9)
    for attend in (layer.distributed, layer.progressive):  # regions of the style have no order
        torch.testing.assert_close(attend(q, k[:, :, order], v[:, :, order]), attend(q, k, v))
    torch.nn.init.constant_(layer.sim_beta, -1e9)
    mean = (v.mean(3) / 17)[:, :, None]
    k_mean = k.mean(3) / 17
    expected = F.scaled_dot_product_attention(q.flatten(2, 3), k_mean, mean[:, :, 0], scale=1.0)
    torch.testing.assert_close(layer.distributed(q, k, v).flatten(2, 3), expected)
    one = layer.progressive(q, k[:, :, :1], v[:, :, :1])
    dense = F.scaled_dot_product_attention(q, k[:, :, :1].expand_as(q), v[:, :, :1].expand_as(q), scale=1.0)
    torch.testing.assert_close(one, dense)
    with pytest.raises(ValueError, match="multiples"):
        layer(content[..., :10], style[..., :10])
    with pytest.raises(ValueError, match="num_heads"):
        AllToKeyAttention(10, num_heads=4)


def test_pama_recorded():
    """Attention alone, and the whole block; the style's pixels have no order, a constant style none either."""
    g = {k: torch.from_numpy(x).double() for k, x in np.load(GOLDENS / "control" / "unet_pama.npz").items()}
    layer = ManifoldAlignment(8).double()
    weights = {k.removeprefix("w_").replace("__", "."): x for k, x in g.items() if k.startswith("w_")}
    layer.load_state_dict(weights)
    torch.testing.assert_close(layer.attend(g["content"], g["style"]), g["attn"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer(g["content"], g["style"]), g["out"], rtol=1e-6, atol=1e-6)
    shuffled = g["style"].flatten(2)[..., torch.randperm(45)].unflatten(2, (5, 9))
    torch.testing.assert_close(layer.attend(g["content"], shuffled), layer.attend(g["content"], g["style"]))
    same = layer.attend(g["content"], torch.ones_like(g["style"])).flatten(2)
    torch.testing.assert_close(same, same[..., :1].expand_as(same))
    with pytest.raises(ValueError, match="must be even"):
        ManifoldAlignment(7)
