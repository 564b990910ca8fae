"""Entropy models: masses of whole numbers sum to one, and slices see earlier ones only."""

import pytest
import torch
from foveal.layers.entropy import FactorizedPrior, SlicedNormal, normal_bits, round_through, uniform_noise


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("moved", [False, True])
def test_masses_of_a_factorized_prior_sum_to_one(moved):
    prior = FactorizedPrior(3, spread=5.0).double()
    if moved:
        for p in prior.parameters():
            torch.nn.init.normal_(p, std=0.5)
    x = torch.arange(-400.0, 401.0).double()
    bits = prior(x.expand(1, 3, -1))
    assert bits.shape == (1, 3, 801) and (bits >= 0).all()
    torch.testing.assert_close((-bits).exp2().sum(-1), torch.ones(1, 3).double(), rtol=0, atol=1e-6)
    assert (prior.cumulative_logits(x.expand(3, 1, -1)).diff(dim=-1) > 0).all()


def test_a_prior_learns_a_distribution():
    """Bits come down to the entropy of what is coded: here one of four numbers, so two bits."""
    prior, values = FactorizedPrior(1), torch.randint(-2, 2, (512, 1, 1)).float()
    optimizer = torch.optim.Adam(prior.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        prior(uniform_noise(values)).mean().backward()
        optimizer.step()
    assert 1.95 < prior(values).mean() < 2.3


def test_masses_of_a_normal_density():
    mean, scale, x = torch.tensor([0.3]), torch.tensor([2.0]), torch.arange(-60.0, 61.0)
    bits = normal_bits(x.double(), mean.double(), scale.double())
    assert (-bits).exp2().sum().item() == pytest.approx(1, abs=1e-6)
    direct = torch.distributions.Normal(0.3, 2.0)
    expected = -(direct.cdf(torch.tensor(1.5)) - direct.cdf(torch.tensor(0.5))).log2()
    torch.testing.assert_close(normal_bits(torch.ones(1), mean, scale), expected[None])
    far = normal_bits(torch.tensor([20.0]), torch.zeros(1), torch.tensor([4.0])).item()  # float32 keeps the tail
    assert far == pytest.approx(normal_bits(*(torch.tensor([n]).double() for n in (20.0, 0.0, 4.0))).item(), rel=1e-3)
    assert normal_bits(torch.zeros(1), torch.zeros(1), torch.zeros(1)).item() < 1e-3  # constants cost nothing
    y = torch.tensor([0.4, 1.6], requires_grad=True)
    round_through(y).sum().backward()
    assert y.grad.eq(1).all() and round_through(y).tolist() == [0.0, 2.0]


def test_slices_see_earlier_ones_only():
    model = SlicedNormal(12, slices=4, support=2).eval()
    y, mean, scale = (5 * torch.randn(2, 12, 4, 4) for _ in range(3))
    found, bits = model(y, mean, scale)
    assert found.shape == bits.shape == y.shape and (bits >= 0).all()
    assert (found - y).abs().max() <= 1  # one half by rounding, one half by what is predicted of it
    other = y.clone()
    other[:, 6:9] += 3.0
    changed, _ = model(other, mean, scale)
    assert torch.equal(changed[:, :6], found[:, :6]) and not torch.equal(changed[:, 6:9], found[:, 6:9])
    assert torch.equal(changed[:, 9:], found[:, 9:])  # the third slice is beyond the support
    other[:, :3] += 3.0
    assert not torch.equal(model(other, mean, scale)[0][:, 9:], found[:, 9:])
    model.train()(y, mean, scale)[1].sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lost.3" not in n and "lost.2" not in n)
    with pytest.raises(ValueError, match="slices=5"):
        SlicedNormal(12, slices=5)
