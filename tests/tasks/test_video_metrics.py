"""Video metrics against their formulas, and a judge that learns moving digits."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from foveal.kernels.block_sparse.reference import dense_bias
from foveal.kernels.ops import masks, na3d
from foveal.zoo.data.moving_digits import MovingDigits
from foveal.zoo.tasks.video_metrics import (
    ClipJudge,
    FrechetVideoDistance,
    attention_mass_recall,
    change_beyond_shift,
    conditional_accuracy,
    fit_judge,
    frechet_distance,
    video_psnr,
    video_ssim,
    window_mass_recall,
)
from torch import nn


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_of_known_gaussians():
    """Samples whose mean and variance are exactly known: |Δμ|² + Σ (σa - σb)² for diagonal covariances."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) * math.sqrt(3 / 4)  # unit covariance
    a, b = signs * torch.tensor([2.0, 1.0]), signs * torch.tensor([0.5, 4.0]) + torch.tensor([1.0, -2.0])
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 1.5**2 + 3**2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_correlated_features_is_the_matrix_formula():
    a, b = normal(50, 6) @ normal(6, 6, seed=1), normal(40, 6, seed=2) @ normal(6, 6, seed=3) + 1
    first, second = (np.cov(x.double().numpy(), rowvar=False) for x in (a, b))
    root = scipy.linalg.sqrtm(first @ second).real
    gap = np.square(a.double().mean(0).numpy() - b.double().mean(0).numpy()).sum()
    expected = gap + np.trace(first + second - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_with_fewer_samples_than_features():
    a, b = normal(5, 20), normal(5, 20, seed=1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, b) > 1
    with pytest.raises(ValueError, match=r"N, M >= 2, got \(1, 20\) and \(5, 20\)"):
        frechet_distance(a[:1], b)
    with pytest.raises(ValueError, match="features must be"):
        frechet_distance(a[:, :3], b)


def test_the_metric_adds_batches_up_and_names_its_extractor():
    judge = ClipJudge(1, 3).eval()
    real, made = normal(9, 1, 4, 8, 8), normal(7, 1, 4, 8, 8, seed=1)
    metric = FrechetVideoDistance(judge.features, num_features=64, name="digits3d", reset_real_features=False)
    for clips in real.split(4):
        metric.update(clips, real=True)
    for clips in made.split(3):
        metric.update(clips, real=False)
    with torch.no_grad():
        expected = frechet_distance(judge.features(made), judge.features(real))
    assert metric.compute().item() == pytest.approx(expected, rel=1e-4)
    assert metric.name == "fvd[digits3d]"
    assert metric.title == "fvd[digits3d], 7 generated and 9 real clips of 4x8x8"
    metric.reset()
    metric.update(made, real=False)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-4)


def test_an_extractor_stays_in_eval_mode_without_gradients():
    extractor = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3))
    metric = FrechetVideoDistance(extractor, num_features=3, name="i3d")
    nn.ModuleList([metric]).train()
    before = extractor[2].running_mean.clone()
    metric.update(normal(4, 1, 4, 4, 4), real=True)
    assert not extractor.training and torch.equal(extractor[2].running_mean, before)
    assert not metric.real_features_sum.requires_grad


def test_accuracy_counts_over_batches():
    clips = torch.arange(5.0).view(5, 1, 1, 1, 1)

    def judge(some):
        return nn.functional.one_hot(some.flatten().long() % 3, 3)

    labels = torch.tensor([0, 1, 2, 1, 1])  # judged 0 1 2 0 1
    assert conditional_accuracy(clips, labels, judge=judge, batch_size=2) == pytest.approx(0.8)


def test_a_judge_follows_from_its_seed_and_leaves_the_generator_alone():
    clips, labels = normal(16, 1, 4, 8, 8), torch.arange(16) % 3
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (fit_judge(clips, labels, steps=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first(clips), again(clips)) and not torch.equal(first(clips), other(clips))
    assert first(clips).shape == (16, 3) and first.features(clips).shape == (16, first.num_features)
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    with pytest.raises(ValueError, match=r"got \(16, 4, 8, 8\) and 16 labels"):
        fit_judge(clips[:, 0], labels)


def digits(split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)  # training clips move as the default generator says
    data = MovingDigits(epoch_length=count, test_length=count).dataset(split)
    items = [data[i] for i in range(count)]
    return torch.stack([item["video"] for item in items]), torch.tensor([item["label"] for item in items])


@pytest.mark.slow
def test_a_judge_learns_digits_it_never_saw_and_tells_noise_from_them():
    judge = fit_judge(*digits("train", 1257), steps=120)
    clips, labels = digits("test", 360)
    assert conditional_accuracy(clips, labels, judge=judge) > 0.6  # chance: 0.1
    real, more, noise = (judge.features(x) for x in (clips[:180], clips[180:], normal(180, *clips.shape[1:])))
    assert frechet_distance(noise, real) > 10 * frechet_distance(more, real)


@pytest.mark.slow
def test_the_judge_of_the_experiment():
    judge = fit_judge(*digits("train", 5028))
    clips, labels = digits("test", 1080)
    assert conditional_accuracy(clips, labels, judge=judge) > 0.93


def test_psnr_of_each_clip():
    clips = torch.zeros(2, 3, 4, 16, 16)
    reference = torch.stack([clips[0] + 0.1, clips[0] + 0.5])
    torch.testing.assert_close(video_psnr(clips, reference), torch.tensor([20.0, 20 * math.log10(2)]))
    torch.testing.assert_close(
        video_psnr(clips, reference, data_range=2.0), torch.tensor([20.0, 20 * math.log10(2)]) + 20 * math.log10(2)
    )
    with pytest.raises(ValueError, match="clips and reference must be"):
        video_psnr(clips, reference[:, :, :2])


def test_ssim_is_the_mean_over_the_frames_of_each_clip():
    reference = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clips = reference.clone()
    clips[1, :, 2] = 1 - clips[1, :, 2]
    same, changed = video_ssim(clips, reference)
    (frame,) = video_ssim(clips[1:, :, 2:], reference[1:, :, 2:])
    assert same == pytest.approx(1.0) and frame < 0
    assert changed == pytest.approx((2 + frame.item()) / 3, abs=1e-5)


def test_recall_of_a_mask_is_the_mass_it_keeps():
    query, key = normal(2, 7, 3, 8), normal(2, 9, 3, 8, seed=1)
    mask = normal(2, 1, 7, 9, seed=2) > 0
    probabilities = (torch.einsum("bqhd,bkhd->bhqk", query, key) * 8**-0.5).softmax(-1)
    expected = (probabilities * mask).sum(-1).mean(-1)
    torch.testing.assert_close(attention_mass_recall(query, key, mask=mask, chunk=3), expected)
    everything = torch.ones(7, 9, dtype=torch.bool)
    torch.testing.assert_close(attention_mass_recall(query, key, mask=everything), torch.ones(2, 3))
    uniform = attention_mass_recall(query, key, mask=mask, scale=0.0)
    torch.testing.assert_close(uniform, mask.float().mean((-2, -1)).expand(2, 3))
    with pytest.raises(TypeError, match="mask must be bool"):
        attention_mass_recall(query, key, mask=mask.float())


@pytest.mark.parametrize(
    "options",
    [{"window": 3}, {"window": (1, 4, 2), "stride": (1, 2, 1)}, {"window": (2, 3, 3), "causal": (True, False, False)}],
)
def test_recall_of_a_window_is_that_of_its_mask(options):
    grid, tokens = (3, 4, 5), 60
    query, key = normal(2, *grid, 2, 8), normal(2, *grid, 2, 8, seed=1)
    flat = query.flatten(1, 3), key.flatten(1, 3)
    # rows of the mask: what reaches a query of equal logits from the one key whose value is 1
    ones = torch.zeros(tokens, *grid, 1, tokens)
    value = torch.eye(tokens).view(1, *grid, 1, tokens)
    mask = na3d(ones[:1], ones[:1], value, **options).view(tokens, tokens) > 0
    recall = window_mass_recall(query, key, **options)
    expected = attention_mass_recall(*flat, mask=mask)
    if "causal" in options:
        frame = torch.arange(tokens) // 20
        past = frame[:, None] >= frame
        logits = (torch.einsum("bqhd,bkhd->bhqk", *flat) * 8**-0.5).masked_fill(~past, -torch.inf)
        expected = (logits.softmax(-1) * mask).sum(-1).mean(-1)
    torch.testing.assert_close(recall, expected)
    assert (recall < 1).all()


@pytest.mark.parametrize("shape", [(23,), (7, 9), (3, 4, 5)], ids=str)
def test_recall_of_lists_is_that_of_their_mask(shape):
    query, key = normal(2, *shape, 2, 8), normal(2, *shape, 2, 8, seed=1)
    mask = masks.vsa(query, key, block=2, sparsity=0.6)
    dense = torch.isfinite(dense_bias(mask, shape, shape, torch.float32))
    flat = query.flatten(1, -3), key.flatten(1, -3)
    recall = attention_mass_recall(query, key, mask=mask)
    torch.testing.assert_close(recall, attention_mass_recall(*flat, mask=dense))
    with pytest.raises(ValueError, match=r"mask\.bias"):
        attention_mass_recall(query, key, mask=mask._replace(bias=torch.zeros(mask.kv_idx.shape)))
    with pytest.raises(TypeError, match="mask must be a bool tensor or a BlockMask"):
        attention_mass_recall(query, key, mask=[1])  # pyright: ignore[reportArgumentType]


def test_recall_of_lists_over_another_grid():
    query, key = normal(1, 3, 5, 2, 8), normal(1, 4, 7, 1, 8, seed=1)
    mask = masks.vsa(query, key, block=2, sparsity=0.6)
    dense = torch.isfinite(dense_bias(mask, (3, 5), (4, 7), torch.float32))
    flat = query.flatten(1, 2), key.flatten(1, 2).expand(-1, -1, 2, -1)
    torch.testing.assert_close(attention_mass_recall(query, key, mask=mask), attention_mass_recall(*flat, mask=dense))


def test_change_beyond_a_shift():
    """Of a form that moves by whole pixels nothing; of two forms, of which one moves, as much as one of them is."""
    clips = torch.full((3, 2, 4, 12, 12), 0.25)  # on grey
    for t in range(4):
        clips[0, :, t, 2 + t : 5 + t, 2 * t : 3 + 2 * t] = 1.0
        clips[1, :, t, 4 : 4 + 2, 4:6] = 1.0
        clips[1, :, t, 4 + t % 2, 4:6] = 0.25  # now the upper row, now the lower one
        clips[1, :, t, 9, 9:11] = 1.0  # that stays
    torch.testing.assert_close(change_beyond_shift(clips), torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)
    assert change_beyond_shift(clips, shift=1)[0] > 0.3  # the form moves by two
    noise = torch.rand(4, 1, 6, 12, 12, generator=torch.Generator().manual_seed(0))
    assert (change_beyond_shift(noise) > 0.8).all()
    scaled = change_beyond_shift(5 * noise - 2)
    torch.testing.assert_close(scaled, change_beyond_shift(noise))  # the units do not matter
    for wrong in (noise[:, :, :1], noise[0], noise[..., :2]):
        with pytest.raises(ValueError, match="clips must be"):
            change_beyond_shift(wrong)


def test_clips_that_are_shuffled_frame_by_frame_change():
    """What a judge and its distance hardly see."""
    data = MovingDigits()
    clips = torch.stack([data.dataset("test")[i]["video"] for i in range(50)])
    clips = data.denormalize(clips)
    shuffled = torch.stack([clips[torch.randperm(50), :, t] for t in range(6)], dim=2)
    assert float(change_beyond_shift(clips).mean()) < 1e-5
    assert float(change_beyond_shift(shuffled).mean()) > 0.5
