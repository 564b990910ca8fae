"""Quality of clips: textures are local, scores lie between them, degraded quarters are where they are said to be."""

import numpy as np
import pytest
import torch
from foveal.zoo.data.degraded import KINDS, TEXTURE, DegradedPans, DegradedPhotos, degrade, texture
from foveal.zoo.quality import FusionWindowAttention, QualityNet, quality_loss
from foveal.zoo.tasks.quality import TokenTrunk
from torch import nn


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Pixels(nn.Module):
    """Tokens are rows of pixels."""

    def forward(self, x):
        return x[:, 0]


def test_textures_are_local_and_scores_lie_between_them():
    net = QualityNet(Pixels(), 4, regions=(2, 3), topk=2).eval()
    clips = torch.randn(2, 1, 3, 8, 12)
    other = clips.clone()
    other[..., 4:, :] = torch.randn(2, 1, 3, 4, 12)  # of the lower regions
    with torch.no_grad():
        one, two = net(clips), net(other)
    assert one.saliency.shape == (2, 3, 2, 3)
    torch.testing.assert_close(one.saliency.sum((1, 2, 3)), torch.ones(2))
    assert torch.equal(one.texture[:, :, 0], two.texture[:, :, 0]) and not one.texture[:, :, 1].equal(
        two.texture[:, :, 1]
    )
    assert not torch.allclose(one.saliency[:, :, 0], two.saliency[:, :, 0])  # saliency compares
    low, high = one.texture.amin((1, 2, 3)), one.texture.amax((1, 2, 3))
    assert ((low <= one.score) & (one.score <= high)).all()
    with pytest.raises(ValueError, match="regions="):
        net(clips[..., :7, :])


def test_a_region_sees_the_means_of_others():
    layer, x = FusionWindowAttention(8, num_heads=2, topk=9).double(), torch.randn(1, 3, 5, 8).double()
    q, k, v = layer.qkv(x).chunk(3, -1)
    for region in range(3):
        others = [i for i in range(3) if i != region]
        keys, values = (torch.cat([t[:, region], t[:, others].mean(2)], 1) for t in (k, v))
        heads = lambda t: t.unflatten(-1, (2, 4)).transpose(1, 2)  # noqa: E731
        weights = (heads(q[:, region]) @ heads(keys).mT / 2).softmax(-1)
        expected = layer.proj((weights @ heads(values)).transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x)[:, region], expected)
    assert layer.choose(torch.eye(3)[[0, 1, 1]][None])[0, 1].tolist()[0] == 2  # never itself
    assert FusionWindowAttention(8)(x[:, :1].float()).shape == (1, 1, 5, 8)  # one region alone


def test_loss_orders_scores():
    target = torch.rand(6)
    assert quality_loss(3 * target + 1, target).abs() < 1e-6
    assert quality_loss(-target, target) > 1
    score = torch.randn(6, requires_grad=True)
    quality_loss(score, target).backward()
    assert score.grad.isfinite().all()


def test_a_trunk_that_sees_details_sees_no_brightness():
    class Features(nn.Identity):
        num_prefix_tokens = 0

        def forward_features(self, x):
            return x

    x = torch.rand(3, 1, 6, 6)
    seen = TokenTrunk(Features(), detail=2.0)(x)[:, :, 0].view(3, 1, 6, 6)
    torch.testing.assert_close(seen[..., 1, 1], 2 * (x[..., 1, 1] - x[..., :3, :3].mean((2, 3))))
    torch.testing.assert_close(TokenTrunk(Features(), detail=2.0)(x + 0.5)[:, :, 0].view_as(seen), seen)
    assert torch.equal(TokenTrunk(Features())(x)[:, :, 0].view_as(x), x)


def test_every_quarter_has_texture():
    frames = [DegradedPans("val", length=9, size=32, frames=2).pan(np.random.default_rng(i))[0] for i in range(40)]
    found = [texture(x) > TEXTURE for x in frames]
    assert any(found) and not all(found)  # of pans as they come
    assert texture(torch.ones(32, 32)) == 0
    half = torch.rand(32, 32)
    half[:16, :16] = 0.5
    assert texture(half) < 0.01 < TEXTURE < texture(torch.rand(32, 32))


def test_degraded_quarters():
    data = DegradedPhotos(train_length=8, batch_size=8)
    data.setup()
    clips, scores, quarters = next(iter(data.train_dataloader()))
    assert clips.shape == (8, 1, 4, 32, 32) and scores.min() >= 0 and scores.max() <= 1 and quarters.max() < 4
    x, generator = torch.rand(2, 16, 16), torch.Generator().manual_seed(0)
    for kind in KINDS:
        distances = [(degrade(x, kind, s, generator) - x).square().mean().item() for s in (0.0, 0.3, 1.0)]
        assert distances[0] < 1e-9 and distances == sorted(distances) and distances[2] > 0.01
    with pytest.raises(ValueError, match=r"data\.size=20"):
        DegradedPhotos(size=20)
