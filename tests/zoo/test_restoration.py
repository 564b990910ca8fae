"""Networks from image to image: official recordings, sizes, masks, tiles."""

import pytest
import torch
from foveal.zoo.restoration import (
    A2N,
    CATANet,
    RegionAttentionTransformer,
    Restorer,
    ShadowRemover,
    restore_in_tiles,
    self_ensemble,
)
from recorded_modules import fill, noise, recorded
from torch import nn
from torch.nn import functional as F

EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@torch.no_grad()
def test_a2n_recorded():
    model = fill(A2N(scale=2).double())
    assert sum(p.numel() for p in model.parameters()) == 1036443
    torch.testing.assert_close(model(noise((1, 3, 10, 12), 10)), recorded("a2n_x2")["y"], **EXACT)


@torch.no_grad()
def test_region_attention_transformer_recorded():
    model = RegionAttentionTransformer(in_chans=1, width=16, encoder=(1, 1), middle=3, decoder=(1, 1))
    at = torch.arange(32)
    regions = at[:, None] // 11 + 3 * (at // 16)
    out = fill(model.double())(noise((2, 1, 32, 32), 5), regions=torch.stack([regions, regions.T]))
    torch.testing.assert_close(out, recorded("rat_w16")["y"], **EXACT)


@torch.no_grad()
@pytest.mark.slow
def test_shadow_remover_recorded():
    model = fill(ShadowRemover(embed_dim=8).double())
    x, mask = noise((1, 3, 176, 176), 21), (noise((1, 1, 176, 176), 22) > 0.5).double()
    found = model(x, mask=mask)[..., ::4, ::4].float()
    torch.testing.assert_close(found, recorded("rasm_e8")["y"], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_catanet_recorded(monkeypatch):
    """The official code sorts without stability: its order among tokens of one center is recorded, and checked here."""
    model, orders = fill(CATANet(scale=4, official_overlap=True).double()), iter(recorded("catanet_x4")["orders"])

    def order(self, normed: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        given = next(orders).long()[None]
        nearest = (F.normalize(normed, dim=-1) @ F.normalize(centers, dim=-1).T).argmax(-1)
        assert torch.equal(given.sort().values[0], torch.arange(32 * 40))
        assert (nearest.gather(1, given).diff() >= 0).all()
        return given

    monkeypatch.setattr(type(model.blocks[0][0]), "order", order)
    assert sum(p.numel() for p in model.parameters()) == 535195
    found = model(noise((1, 3, 32, 40), 11))[..., ::5, ::5]
    torch.testing.assert_close(found, recorded("catanet_x4")["y"].double(), rtol=1e-6, atol=1e-6)


def test_tokens_of_a_center_keep_their_order():
    block = CATANet(depth=1).blocks[0][0]
    assert torch.equal(block.order(torch.ones(1, 900, 40), block.means)[0], torch.arange(900))


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(
    "make", [lambda s: A2N(scale=s, width=8, up_width=8, depth=2), lambda s: CATANet(scale=s, depth=2)]
)
def test_scales(make, scale):
    model = make(scale)
    x = torch.rand(1, 3, 30, 33)
    out = model(x)
    assert out.shape == (1, 3, 30 * scale, 33 * scale)
    out.square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters())
    with torch.no_grad():
        for p in model.conv_last.parameters() if isinstance(model, A2N) else model.last_conv.parameters():
            p.zero_()
        torch.testing.assert_close(model(x), F.interpolate(x, scale_factor=scale, mode="bilinear"))


def test_branches_of_a2n():
    model = A2N(scale=2, width=8, depth=1)
    block, x = model.AAB_trunk[0], 100 * torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(block.weights(x).sum(-1), torch.ones(2))
    nn.init.zeros_(block.ADM[2].weight)
    torch.testing.assert_close(block.weights(x), torch.full((2, 2), 0.5))
    assert model.state_dict().keys() == A2N(scale=3, width=8, depth=1).state_dict().keys()


def test_groups_of_catanet():
    """One group of all tokens is plain attention, whose own keys appear twice, and attention to centers."""
    model = CATANet(depth=1).double().eval()
    layer = model.blocks[0][0].iasa_attn
    x, order = torch.randn(1, 20, 40, dtype=torch.float64), torch.randperm(20)[None]
    centers = torch.randn(5, 36, dtype=torch.float64), torch.randn(5, 40, dtype=torch.float64)
    heads = lambda t: t.unflatten(-1, (4, -1)).transpose(-2, -3)  # noqa: E731
    q, k, v = (heads(f(x)) for f in (layer.to_q, layer.to_k, layer.to_v))
    expected = F.scaled_dot_product_attention(q, k, v)
    expected = expected + F.scaled_dot_product_attention(q, *(heads(c)[None] for c in centers))
    found = layer(x, order, *centers)
    torch.testing.assert_close(found, layer.proj(expected.transpose(1, 2).flatten(2)))


def test_windows_of_catanet_average():
    layer = CATANet(depth=1).blocks[0][1]
    for p in (*layer.layer[0].fn.proj.parameters(), *layer.layer[1].fn.fc2.parameters()):
        nn.init.zeros_(p)
    x = torch.randn(1, 40, 31, 45)  # three windows meet in a row and a column
    torch.testing.assert_close(layer(x), x)
    layer.official_overlap = True
    assert (layer(x) / x).min().item() == pytest.approx(0.75**2, rel=1e-4)
    torch.testing.assert_close(layer(x[..., :30, :44]), x[..., :30, :44])


def test_centers_of_catanet_follow_the_tokens():
    model = CATANet(depth=1).train()
    block = model.blocks[0][0]
    assert not block.initted
    model(torch.rand(2, 3, 28, 28))
    first = block.means.clone()
    assert block.initted
    model(torch.rand(2, 3, 28, 28))
    assert 0 < (block.means - first).abs().max() < 0.1
    model.eval()(torch.rand(1, 3, 28, 28))
    empty = block.irca_attn.refine(torch.ones(1, 4, 40), torch.stack([torch.ones(40), -torch.ones(40)]))
    torch.testing.assert_close(empty[1], -torch.ones(40))


def test_regions_decide_what_is_seen():
    model = RegionAttentionTransformer(in_chans=1, width=8, encoder=(1, 1), middle=3, decoder=(1, 1)).eval()
    x, one, two = torch.rand(1, 1, 20, 36), torch.zeros(1, 20, 36).long(), torch.zeros(1, 20, 36).long()
    two[..., 18:] = 1
    assert torch.equal(model(x, regions=one), model(x, regions=two))  # attention starts at weight 0
    for block in model.middle_blks:
        for layer in block.layers:
            nn.init.ones_(layer.lambda_ra)
    assert not torch.allclose(model(x, regions=one), model(x, regions=two))
    assert torch.equal(model(x, regions=one), model(x)) and torch.equal(
        model(x, regions=two), model(x, regions=2 - two)
    )
    with pytest.raises(ValueError, match="middle"):
        RegionAttentionTransformer(middle=4)


def test_shadow_remover_sizes_and_mask():
    model = ShadowRemover(embed_dim=8, depth=1, window=3, dilation=1)
    x, mask = torch.rand(1, 3, 30, 44), torch.zeros(1, 1, 30, 44)
    out = model(x, mask=mask)
    assert out.shape == x.shape and torch.equal(out, model(x))
    mask[..., 10:20, 10:20] = 1
    assert not torch.allclose(model(x, mask=mask), out)
    out.sum().backward()
    with torch.device("meta"):
        published = ShadowRemover()
    assert round(sum(p.numel() for p in published.parameters()) / 1e6, 2) == 5.18


class Blur(Restorer):
    """Looks one pixel around."""

    def residual(self, x):
        return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1) - x


def test_tiles_and_self_ensemble():
    model, x = Blur(), torch.rand(1, 3, 50, 61)
    found = restore_in_tiles(model, x, tile=24, overlap=8)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert (found - model(x))[inner].abs().max() < 0.12  # borders of tiles look at less
    assert restore_in_tiles(model, x, tile=64).allclose(model(x))
    torch.testing.assert_close(self_ensemble(model, x), model(x))
    up = A2N(width=8, up_width=8, depth=1)
    assert restore_in_tiles(up, x, tile=32, overlap=8).shape == (1, 3, 100, 122)
    with pytest.raises(ValueError, match="overlap"):
        restore_in_tiles(model, x, tile=16, overlap=8)
    with pytest.raises(ValueError, match="28 pixels"):
        CATANet(depth=1)(torch.rand(1, 3, 20, 40))
    with pytest.raises(ValueError, match="scale"):
        A2N(scale=5)
