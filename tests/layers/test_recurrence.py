"""Layers around recurrences and long convolutions: recordings of official code, papers' properties, gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
from foveal.kernels.ops import long_convolution, scan_attention, scan_order
from foveal.layers import (
    HyenaConvolution,
    LocalScanBlock,
    MovingAverage,
    MovingAverageGatedAttention,
    PolylinePathAttention2d,
    RecurrentChunkAttention,
    Scan1d,
    Scan2d,
    ScanAttention,
    ShortLongConvolution,
    alibi_slopes,
    exact_step,
    polyline,
    recurrent_chunk_attention,
)
from torch import Tensor, nn
from torch.nn import functional as F

RECORDED = np.load(Path(__file__).parents[1] / "goldens" / "scans.npz")
DOUBLE = {"dtype": torch.float64}


def recorded(name: str) -> Tensor:
    return torch.from_numpy(RECORDED[name]).double()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(make) -> nn.Module:
    torch.manual_seed(0)
    return make()


SEQUENCES = {
    "lightning": lambda: ScanAttention(12, num_heads=3, **DOUBLE),
    "delta": lambda: ScanAttention(12, num_heads=3, rule="delta", decay="gate", direction="forward", **DOUBLE),
    "efla": lambda: ScanAttention(12, num_heads=3, rule="exact", decay="none", gate_dim=0, **DOUBLE),
    "rat": lambda: RecurrentChunkAttention(12, num_heads=2, chunk=5, **DOUBLE),
    "docmamba": lambda: Scan1d(12, num_heads=4, state_dim=5, **DOUBLE),
    "mega": lambda: MovingAverageGatedAttention(12, key_dim=6, value_dim=8, tokens=15, averages=3, **DOUBLE),
    "chela": lambda: MovingAverageGatedAttention(
        12, key_dim=6, value_dim=8, tokens=15, weights="scan", short=3, **DOUBLE
    ),
    "hyena": lambda: HyenaConvolution(12, hidden=8, **DOUBLE),
}
MAPS = {
    "criss cross": lambda: PolylinePathAttention2d(12, num_heads=3, **DOUBLE),
    "whole": lambda: PolylinePathAttention2d(12, num_heads=3, form="whole", **DOUBLE),
    "scan2d": lambda: Scan2d(12, num_heads=4, state_dim=5, **DOUBLE),
    "gilbert": lambda: ScanAttention(12, num_heads=3, order="gilbert", **DOUBLE),
}


@pytest.mark.parametrize("name", [*SEQUENCES, *MAPS])
def test_gradients_reach_all_parameters(name):
    layer = build({**SEQUENCES, **MAPS}[name])
    x = random(2, *((5, 3) if name in MAPS else (15,)), 12).requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    assert out.shape == x.shape and out.isfinite().all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    with pytest.raises(ValueError, match=r"x has shape"):
        layer(x[..., :5])


@pytest.mark.parametrize("name", ["lightning", "efla", "docmamba", "mega", "chela", "hyena"])
def test_both_directions_reach_every_token(name):
    layer, x = build(SEQUENCES[name]), random(1, 15, 12).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0, 7].sum(), x)
    assert (gradient[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("name", ["delta", "rat"])
def test_causal_layers_do_not_look_ahead(name):
    layer, x = build(SEQUENCES[name]), random(1, 15, 12).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0, 7].sum(), x)
    assert (gradient[0, 8:] == 0).all() and (gradient[0, :8].abs().sum(-1) > 0).all()


# Lightning attention and EFLA


def test_slopes():
    torch.testing.assert_close(-alibi_slopes(2).double(), recorded("decay.slopes"))
    last = alibi_slopes(4, layer=5, layers=6)
    torch.testing.assert_close(last, alibi_slopes(4) * 1e-5)
    with pytest.raises(ValueError, match="layer=6 must lie in 0"):
        alibi_slopes(4, layer=6, layers=6)


def test_efla_is_recorded():
    query, key, value, beta = (recorded(f"delta.{x}").transpose(1, 2) for x in ("q", "k", "v", "beta"))
    step = exact_step(key, beta)
    torch.testing.assert_close(step, recorded("delta.efla_alpha").transpose(1, 2), rtol=1e-5, atol=1e-6)
    out, state = scan_attention(query, key, value, beta=step, scale=8**-0.5, return_state=True)
    torch.testing.assert_close(out, recorded("delta.efla_out").transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, recorded("delta.efla_state"), rtol=1e-5, atol=1e-5)


def test_efla_solves_its_differential_equation():
    """dS/dt = k (v - S' k)' over a time beta, by the exponential of a matrix."""
    key, value, state = random(6), random(3, seed=1), random(6, 3, seed=2)
    beta = torch.tensor(0.7, dtype=torch.float64)
    generator = torch.zeros(9, 9, dtype=torch.float64)  # of the columns of S, and of the constant v
    generator[:6, :6], generator[:6, 6:] = -torch.outer(key, key), torch.outer(key, value)
    propagator = torch.matrix_exp(beta * generator)
    expected = propagator[:6, :6] @ state + propagator[:6, 6:]
    got = state + exact_step(key, beta) * torch.outer(key, value - state.T @ key)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(exact_step(1e-7 * key, beta), beta)


# RAT


def test_rat_is_recorded():
    layer = RecurrentChunkAttention(16, num_heads=2, chunk=4, **DOUBLE)
    names = ("gate_bias", "in_proj.weight", "input_norm.weight", "out_proj.weight")
    layer.load_state_dict({name: recorded(f"rat.{name}") for name in names})
    torch.testing.assert_close(layer(recorded("rat.x")), recorded("rat.out"), rtol=1e-12, atol=1e-12)
    tensors = (recorded(f"rat.op_{x}") for x in "qkvg")
    got = recurrent_chunk_attention(*tensors, chunk=4)
    torch.testing.assert_close(got, recorded("rat.op_out"), rtol=1e-12, atol=1e-12)


def test_rat_of_single_tokens_is_causal_attention():
    query, key, value = (random(1, 9, 2, 4, seed=i) for i in range(3))
    got = recurrent_chunk_attention(query, key, value, torch.zeros_like(key), chunk=1)
    heads = (x.transpose(1, 2) for x in (query, key, value))
    torch.testing.assert_close(got.transpose(1, 2), F.scaled_dot_product_attention(*heads, is_causal=True))


# Mega and CHELA


def test_moving_average_is_its_recurrence():
    layer = build(lambda: MovingAverage(3, averages=4, **DOUBLE))
    x = random(2, 11, 3)
    newest, damping = layer.alpha.sigmoid().squeeze(-1), layer.delta.sigmoid().squeeze(-1)
    weights = newest * layer.beta.squeeze(-1) * layer.gamma * 4**-0.5

    def run(tokens: Tensor, own: slice) -> Tensor:
        state, outs = torch.zeros(2, 3, 4, **DOUBLE), []
        for t in range(11):
            state = (1 - newest * damping)[own] * state + tokens[:, t, :, None]
            outs.append((state * weights[own]).sum(-1))
        return torch.stack(outs, 1)

    ahead = run(x.flip(1), slice(3, 6)).flip(1)
    ahead = F.pad(ahead[:, 1:], (0, 0, 0, 1))  # from the next token on
    torch.testing.assert_close(layer(x), F.silu(run(x, slice(0, 3)) + ahead + layer.omega * x))


def test_short_and_long_filters_are_one():
    layer, x = build(lambda: ShortLongConvolution(3, tokens=9, short=3, **DOUBLE)), random(1, 9, 3)
    apart = long_convolution(x, layer.long, center=8) + long_convolution(x, layer.short, center=1)
    torch.testing.assert_close(layer(x), F.silu(apart + layer.omega * x))


# DocMamba and LaMamba-Diff


def test_scan1d_in_the_order_of_segments():
    layer, x = build(SEQUENCES["docmamba"]), random(1, 15, 12)
    order, inverse = scan_order((15,), "segments", segments=torch.arange(15) % 4)
    torch.testing.assert_close(layer(x, order=order), layer(x[:, order])[:, inverse])


def test_local_scan_block_begins_as_the_identity():
    block = build(lambda: LocalScanBlock(12, cond_dim=4, num_heads=2, window=3, shift=1, state_dim=5, **DOUBLE))
    x, cond = random(2, 6, 5, 12), random(2, 4)
    assert torch.equal(block(x, cond), x)
    nn.init.normal_(block.modulation.weight, std=0.1)
    out = block(x, cond)
    assert out.shape == x.shape and not torch.equal(out, x)
    out.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


# Hyena


def test_hyena_is_its_matrix():
    """The filter reaches every distance, in both directions."""
    layer, x = build(SEQUENCES["hyena"]), random(1, 15, 12)
    outer, inner, value = layer.short(layer.in_proj(x).mT).mT.chunk(3, dim=-1)
    filters = layer.filter(15) / 15**0.5
    place = torch.arange(15)
    distance = place[:, None] - place
    matrix = torch.where(distance[..., None] >= 0, filters[distance.abs(), :12], filters[distance.abs(), 12:])
    mixed = torch.einsum("nmc,bmc->bnc", matrix, value * inner) + layer.skip * value * inner
    torch.testing.assert_close(layer(x), layer.out_proj(mixed * outer))


# PPMA


def test_polyline_masks_are_path_sums():
    """Both paths, walked token by token."""
    along, down = -random(3, 4).abs(), -random(3, 4, seed=1).abs()
    query, key, value = (random(1, 1, 3, 4, 2, seed=i) for i in range(3))
    sums = along.cumsum(1)[None, None], down.cumsum(0)[None, None]
    got = polyline._rows(query, key, value, (sums[0],) * 2, (sums[1],) * 2)

    def row(i: int, a: int, b: int) -> Tensor:
        return along[i, min(a, b) + 1 : max(a, b) + 1].sum()

    def column(j: int, a: int, b: int) -> Tensor:
        return down[min(a, b) + 1 : max(a, b) + 1, j].sum()

    places = [(i, j) for i in range(3) for j in range(4)]
    first = torch.stack([row(i, j, v) + column(v, i, u) for i, j in places for u, v in places]).view(12, 12)
    second = torch.stack([column(j, i, u) + row(u, j, v) for i, j in places for u, v in places]).view(12, 12)
    q, k, v = (x.flatten(2, 3)[0, 0] for x in (query, key, value))
    expected = 0.5 * ((q @ k.T + first).softmax(-1) + (q @ k.T + second).softmax(-1)) @ v
    torch.testing.assert_close(got.flatten(2, 3)[0, 0], expected)


def test_rows_in_turns_change_nothing(monkeypatch):
    layer, x = build(MAPS["whole"]), random(2, 5, 3, 12).requires_grad_()
    whole = layer(x)
    expected = torch.autograd.grad(whole.square().sum(), x)
    monkeypatch.setattr(polyline, "LOGITS", 600)
    found = layer(x)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x), expected)
