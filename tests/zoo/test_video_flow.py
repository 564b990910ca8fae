"""Rectified flow against its formulas and against the scheduler of diffusers that samples with it."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from foveal.zoo.video.flow import TIMESTEPS, add_noise, flow_loss, sample_time, shift_time, spread_time, velocity

VIDEO, NOISE = torch.randn(2, 3, 2, 4, 6, 5, generator=torch.Generator().manual_seed(0))  # [B, C, T, H, W] each


@pytest.mark.parametrize("shift", [1.0, 2.0, 5.0])
def test_times_and_noising_are_those_of_the_scheduler(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    plain = torch.arange(TIMESTEPS, 0, -1, dtype=torch.float64) / TIMESTEPS
    torch.testing.assert_close(shift_time(plain, shift) * TIMESTEPS, scheduler.timesteps.double(), rtol=1e-6, atol=0)
    picked = scheduler.timesteps[[3, 400, 990]]
    theirs = scheduler.scale_noise(VIDEO, picked, NOISE)
    torch.testing.assert_close(add_noise(VIDEO, NOISE, picked / TIMESTEPS), theirs)


def test_the_scheduler_walks_back_along_the_velocity():
    """Euler with the true velocity leads from noise to the video in any number of steps."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    x = NOISE
    for timestep in scheduler.timesteps:
        x = scheduler.step(velocity(VIDEO, NOISE), timestep, x, return_dict=False)[0]
    torch.testing.assert_close(x, VIDEO, rtol=0, atol=1e-5)


def test_velocity_is_the_derivative_of_the_path():
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    video, noise = VIDEO.double(), NOISE.double()
    slope = (add_noise(video, noise, t + 1e-4) - add_noise(video, noise, t - 1e-4)) / 2e-4
    torch.testing.assert_close(velocity(video, noise), slope)


@pytest.mark.parametrize(("shift", "mean", "std"), [(1.0, 0.0, 1.0), (3.0, 0.0, 1.0), (1.0, -0.5, 0.7)])
def test_density_of_the_times(shift, mean, std):
    """Quantiles of a logit-normal are those of the normal, mapped."""
    t = sample_time((200_000,), shift=shift, mean=mean, std=std, generator=torch.Generator().manual_seed(1))
    assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1
    q = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    normal = mean + std * math.sqrt(2) * torch.erfinv(2 * q - 1)
    torch.testing.assert_close(torch.quantile(t, q), shift_time(torch.sigmoid(normal), shift), rtol=0, atol=0.005)


def test_the_same_generator_gives_the_same_times():
    draw = [sample_time((4, 2), generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_a_time_per_group_of_frames():
    t = torch.tensor([[0.0, 1.0], [0.3, 0.3], [1.0, 0.0]])
    mixed = add_noise(VIDEO, NOISE, t)
    torch.testing.assert_close(mixed[0], torch.cat([VIDEO[0, :, :2], NOISE[0, :, 2:]], dim=1))
    torch.testing.assert_close(mixed[1], add_noise(VIDEO, NOISE, t[:, 0])[1])
    torch.testing.assert_close(mixed[2], torch.cat([NOISE[2, :, :2], VIDEO[2, :, 2:]], dim=1))


def test_loss_is_the_mean_square_and_weights_choose():
    plain = flow_loss(VIDEO, NOISE)
    torch.testing.assert_close(plain, (VIDEO - NOISE).square().mean())
    torch.testing.assert_close(flow_loss(VIDEO, NOISE, weight=torch.full((3,), 7.0)), plain)
    only_second = flow_loss(VIDEO, NOISE, weight=torch.tensor([0.0, 2.0, 0.0]))
    torch.testing.assert_close(only_second, (VIDEO - NOISE)[1].square().mean())
    last_frames = flow_loss(VIDEO, NOISE, weight=torch.tensor([[0.0, 1.0]] * 3))
    torch.testing.assert_close(last_frames, (VIDEO - NOISE)[:, :, 2:].square().mean())
    assert flow_loss(VIDEO, NOISE, weight=torch.zeros(3)) == 0


def test_loss_is_float32_whatever_the_model_is():
    loss = flow_loss(VIDEO.bfloat16(), NOISE, weight=torch.ones(3))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (VIDEO.bfloat16().float() - NOISE).square().mean())


@pytest.mark.parametrize("shape", [(2,), (3, 3), (3, 1, 1)])
def test_times_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="accepted are"):
        spread_time(torch.zeros(shape), VIDEO)


def test_a_shift_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="shift=0"):
        shift_time(torch.ones(1), 0.0)
