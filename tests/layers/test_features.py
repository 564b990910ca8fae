"""Features for linear attention: series of the exponential, and log-normal weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from foveal.kernels.ops import linear_attention, scan_attention
from foveal.layers.features import log_normal_features, taylor_features

RECORDED = Path(__file__).parents[1] / "goldens" / "variants.npz"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_products_are_the_series(order):
    q, k = 0.5 * torch.randn(5, 4).double(), 0.5 * torch.randn(7, 4).double()
    s = q @ k.T
    expected = sum(s**n / torch.tensor(n).double().lgamma().exp() / max(n, 1) for n in range(1, order + 1)) + 1
    torch.testing.assert_close(taylor_features(q, order=order) @ taylor_features(k, order=order).T, expected)
    with pytest.raises(ValueError, match="order=0"):
        taylor_features(q, order=0)


def test_high_orders_are_softmax_attention():
    q, k, v = (torch.randn(1, 9, 1, 3).double().clamp(-1, 1) / 2 for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(*(t[:, :, 0] for t in (q, k, v)), scale=1.0)
    out = linear_attention(taylor_features(q, order=8), taylor_features(k, order=8), v, eps=0.0)
    torch.testing.assert_close(out[:, :, 0], expected, rtol=1e-6, atol=1e-6)


def test_series_recorded():
    """The causal Taylor attention of flash-linear-attention, by a scan whose last value is one."""
    with np.load(RECORDED) as z:
        q, k, v, out = (torch.from_numpy(z[f"taylor2/{n}"]).transpose(1, 2) for n in ("q", "k", "v", "out"))
    q, k = (taylor_features(t.double() * t.shape[-1] ** -0.25) for t in (q, k))
    found = scan_attention(q, k, torch.cat([v, torch.ones_like(v[..., :1])], -1).double())
    torch.testing.assert_close((found[..., :-1] / (found[..., -1:] + 1e-6)).float(), out, rtol=2e-5, atol=2e-6)


def test_log_normal_weights_vary_as_those_of_a_softmax():
    for sigma in (1.2, 1.4):  # the fit is of head dims near 64
        q, k = (sigma * torch.randn(1, 400, 1, 64).double() for _ in range(2))
        features = log_normal_features(q, k)
        assert all(f.min() > 0 and f.max() <= 1 for f in features)
        found = (features[0][0, :, 0] @ features[1][0, :, 0].T).log()
        within = (found - found.mean(1, keepdim=True)).var()  # of a row, where constants cancel
        softmax = (q[0, :, 0] @ k[0, :, 0].T / 8).var()
        assert within / softmax == pytest.approx(1, abs=0.1)
    wide = log_normal_features(q, k)[1]
    torch.testing.assert_close(log_normal_features(q, k, key_std=k.std(), query_std=q.std())[1], wide)
    assert not torch.allclose(log_normal_features(q, k, key_std=2 * k.std())[1], wide)
