"""Pre-training: official recordings of HPM, DropPos, CroCo and ColorMAE, and what defines masks and losses."""

import numpy as np
import pytest
import timm
import torch
from foveal.zoo.pretraining import (
    BroadContext,
    CrossViewCompletion,
    DroppedPositions,
    MaskedAutoencoder,
    absolute_loss,
    color_noise,
    color_order,
    follow,
    hard_order,
    pattern_order,
    random_order,
    relative_loss,
    restore,
    second_view,
    visible_count,
)
from foveal.zoo.pretraining.autoencoder import take
from foveal.zoo.pretraining.positions import smoothed_places
from recorded_modules import fill, noise, recorded
from torch.nn import functional as F

EXACT = {"rtol": 1e-6, "atol": 1e-6}  # tables of positions are float32 in the official code
TINY = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "decoder_embed_dim": 24,
    "decoder_depth": 1,
    "decoder_num_heads": 4,
}
CROSS = {
    "img_size": 32,
    "patch_size": 8,
    "enc_embed_dim": 32,
    "enc_depth": 2,
    "enc_num_heads": 4,
    "dec_embed_dim": 32,
    "dec_depth": 2,
    "dec_num_heads": 4,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def visible_first(mask):
    """The order in which visible patches stand first, masked ones behind, both as in the image."""
    return torch.stack([torch.cat([(~row).nonzero()[:, 0], row.nonzero()[:, 0]]) for row in mask])


# masks


def test_counts():
    assert (visible_count(196, 0.75), visible_count(20, 0.9)) == (49, 1)
    with pytest.raises(ValueError, match="ratio"):
        visible_count(4, 0.9)


def test_patterns_recorded():
    z = recorded("colormae_mask")
    order = pattern_order(noise((3, 14, 14), 42))
    assert torch.equal(order[:, : visible_count(196, 0.75)], z["ids_keep"])
    assert torch.equal(restore(order), z["ids_restore"])


def spectrum(kind):
    """Share of energy in the lower, middle and upper third of radii."""
    x = color_noise(64, 32, kind, generator=torch.Generator().manual_seed(0))
    power = torch.fft.fft2(x).abs().square().mean(0)
    f = torch.fft.fftfreq(32)
    radius = (f[:, None] ** 2 + f**2).sqrt() / 0.5
    return [power[(radius > a / 3) & (radius <= (a + 1) / 3)].mean().item() for a in range(3)]


def test_colors_have_their_spectrum():
    red, green, blue, purple = (spectrum(kind) for kind in ("red", "green", "blue", "purple"))
    assert red[0] > 10 * red[2] and blue[2] > 2 * blue[0]
    assert green[1] > 1.5 * green[2] and green[1] > 1.2 * green[0]
    assert purple[1] < purple[2]
    with pytest.raises(ValueError, match="kind"):
        color_noise(1, 8, "pink")
    with pytest.raises(ValueError, match="sigma"):
        color_noise(1, 8, "red", sigma=(2.0, 1.0))


def test_color_orders_are_orders():
    patterns = color_noise(8, 24, "green")
    order = color_order(patterns, 4, (14, 14), generator=torch.Generator().manual_seed(1))
    assert torch.equal(order.sort().values, torch.arange(196).expand(4, -1))
    assert not torch.equal(order[0], order[1])
    with pytest.raises(ValueError, match="too few"):
        color_order(patterns, 9, (14, 14))


def test_the_hardest_patches_are_masked():
    scores = torch.randn(3, 16)
    for progress, hardest in ((0.0, 0), (0.5, 3), (1.0, 6)):
        order = hard_order(scores, 0.75, progress)
        assert torch.equal(order.sort().values, torch.arange(16).expand(3, -1))
        masked = order[:, 4:]
        for row, s in zip(masked, scores, strict=True):
            assert set(s.topk(hardest).indices.tolist()) <= set(row.tolist()) if hardest else True
    with pytest.raises(ValueError, match="progress"):
        hard_order(scores, 0.75, 2.0)


# pixels


@torch.no_grad()
def test_hard_patches_recorded():
    z, model = recorded("hpm_tiny"), MaskedAutoencoder(loss_prediction=True, **TINY).double()
    torch.testing.assert_close(model.pos_embed[0], z["pos_embed"], rtol=0, atol=0)
    torch.testing.assert_close(model.decoder_pos_embed[0], z["decoder_pos_embed"], rtol=0, atol=0)
    fill(model, keep=("pos_embed",))
    order = visible_first(z["mask"])
    found = model(noise((2, 3, 32, 32), 30), order)
    torch.testing.assert_close(found.features, z["features"], **EXACT)
    torch.testing.assert_close(take(found.prediction, order)[:, :, ::3].float(), z["pix_pred"], **EXACT)
    predicted = found.predicted_losses.gather(1, order)
    torch.testing.assert_close(predicted, z["loss_pred"], **EXACT)
    torch.testing.assert_close(found.losses, z["loss_per_patch"], **EXACT)
    torch.testing.assert_close(found.losses.mean(), z["loss"], **EXACT)
    torch.testing.assert_close(relative_loss(predicted[:, 4:], found.losses), z["loss_relative"], **EXACT)
    torch.testing.assert_close(absolute_loss(predicted[:, 4:], found.losses), z["loss_absolute"], **EXACT)


def test_masked_pixels_are_not_seen_and_visible_ones_not_judged():
    model, x = MaskedAutoencoder(**TINY), torch.randn(2, 3, 32, 32)
    order = random_order(2, 16)
    found = model(x, order)
    changed = x.clone()
    for image, row in zip(changed, order, strict=True):
        for patch in row[4:].tolist():
            r, c = divmod(patch, 4)
            image[:, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8] = 0
    assert torch.equal(model(changed, order).features, found.features)
    (grad,) = torch.autograd.grad(found.losses.sum(), found.prediction)
    seen = take(grad, order[:, :4])
    assert (seen == 0).all() and take(grad, order[:, 4:]).abs().sum() > 0


def test_the_trunk_is_timms():
    trunk = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0
    )
    model = MaskedAutoencoder(**TINY)
    missing, unexpected = trunk.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all("decoder" in n or n == "mask_token" for n in unexpected)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(trunk.forward_features(x), model.encode(x), rtol=1e-4, atol=1e-5)


def test_images_are_learnt_by_heart():
    model, order = MaskedAutoencoder(**TINY, norm_pix_loss=False), random_order(4, 16)
    x = F.interpolate(torch.rand(4, 3, 4, 4), 32, mode="bilinear")
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0)
    losses = []
    for _ in range(200):
        loss = model(x, order).losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


# other objectives


@torch.no_grad()
def test_dropped_positions_recorded():
    z, model = recorded("droppos_guided"), DroppedPositions(official_smoothing=True, **TINY).double()
    fill(model, keep=("pos_embed",))
    order = torch.from_numpy(np.random.RandomState(37).rand(2, 16)).argsort(-1)
    drop_order = torch.from_numpy(np.random.RandomState(38).rand(2, 8)).argsort(-1)
    found = model(noise((2, 3, 32, 32), 36), order, drop_order, ratio=0.5, drop_ratio=0.75, sigma=1.0)
    torch.testing.assert_close(smoothed_places(4, 1.0, official=True), z["smooth"])
    assert torch.equal(found.dropped, z["mask_pos"]) and torch.equal(order[:, :8], z["ids_keep"])
    torch.testing.assert_close(found.logits, z["pred"], **EXACT)
    torch.testing.assert_close(found.loss, z["loss"], **EXACT)
    assert found.accuracy.item() == z["accuracy"].item()


def test_places_without_positions():
    rows = smoothed_places(4, 1.0)
    torch.testing.assert_close(rows.sum(-1), torch.ones(16).double())
    assert torch.equal(smoothed_places(4, 0.0), torch.eye(16).double())
    model, x = DroppedPositions(**TINY).eval(), torch.randn(1, 3, 32, 32)
    order, drop = torch.arange(16)[None], torch.arange(8)[None]
    permuted = torch.randperm(8)
    moved = torch.cat([order[:, :8][:, permuted], order[:, 8:]], 1)
    a, b = (model(x, o, drop, ratio=0.5, drop_ratio=1.0) for o in (order, moved))
    torch.testing.assert_close(a.logits[:, permuted], b.logits, rtol=1e-4, atol=1e-5)
    assert a.dropped.all()


@torch.no_grad()
def test_cross_views_recorded():
    z, model = recorded("croco_cosine"), fill(CrossViewCompletion(**CROSS).double(), keep=("pos_embed",))
    views = noise((2, 3, 32, 32), 39), noise((2, 3, 32, 32), 40)
    found = model(*views, visible_first(z["mask"]), masked=12)
    torch.testing.assert_close(found.prediction[:, :, ::3].float(), z["out"], **EXACT)
    torch.testing.assert_close(found.loss, z["loss"], **EXACT)
    other = model(views[0], noise((2, 3, 32, 32), 41), visible_first(z["mask"]), masked=12)
    assert not torch.allclose(other.prediction, found.prediction)


def test_broad_context():
    head = BroadContext(16, hidden=32)
    first, second = BroadContext.disjoint(random_order(3, 16), 0.75)
    assert first.shape == second.shape == (3, 4)
    assert all(not set(a.tolist()) & set(b.tolist()) for a, b in zip(first, second, strict=True))
    x = torch.randn(8, 16)
    target = head.predictor(head.head(x))
    assert head.loss((x, x), (target, target)).item() == pytest.approx(0, abs=1e-5)
    teacher = torch.randn(8, 16, requires_grad=True)
    loss = head.loss((x, x), (teacher, teacher))
    loss.backward()
    assert teacher.grad is None and all(p.grad is not None for p in head.parameters())
    assert loss.item() == pytest.approx((2 - 2 * F.cosine_similarity(target, teacher)).mean().item(), rel=1e-4)
    with pytest.raises(ValueError, match="ratio"):
        BroadContext.disjoint(random_order(3, 16), 0.25)


def test_a_teacher_follows():
    student, teacher = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = teacher.weight.clone()
    follow(teacher, student, 0.9)
    torch.testing.assert_close(teacher.weight, 0.9 * before + 0.1 * student.weight)


def test_second_views_are_turned_moved_and_brightened():
    images, fixed = torch.randn(2, 1, 16, 16).double(), torch.Generator().manual_seed(0)
    torch.testing.assert_close(second_view(images), images)
    view = second_view(images, jitter=0.4, generator=fixed)
    for a, b in zip(view, images, strict=True):  # a line through the pixels
        slope = (a - a.mean()).flatten() / (b - b.mean()).flatten()
        torch.testing.assert_close(slope, slope[:1].expand_as(slope))
        assert 0.6 <= slope[0] <= 1.4
    again = [second_view(images, degrees=20, shift=0.2, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*again) and (again[0] - images).abs().max() > 0.1
    flat = torch.full((2, 3, 8, 8), 0.5)
    torch.testing.assert_close(second_view(flat, degrees=45, shift=0.5), flat)  # borders reflect, nothing is black
    with pytest.raises(ValueError, match="shift=-1"):
        second_view(images, shift=-1)


def test_statistics_of_a_teacher_follow():
    student, teacher = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    student.running_mean += 1
    follow(teacher, student, 0.75)
    torch.testing.assert_close(teacher.running_mean, torch.full((2,), 0.25))
