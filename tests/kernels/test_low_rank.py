"""Thin factors of biases: that they are exact or as good as they say, and that every attention takes them."""

import math

import pytest
import torch
from foveal.kernels.low_rank import (
    alibi_factors,
    axis_factors,
    factorize,
    grid_positions,
    pad_head_dim,
    squared_distance_factors,
    tile_factor,
    widen,
)
from foveal.kernels.neighborhood import make_axes
from foveal.kernels.neighborhood.geometry import mask
from foveal.kernels.ops import biased_attention, na2d, relative_bias, window_attention
from torch.nn.functional import scaled_dot_product_attention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def dense(query, key, value, bias, scale=None):
    """Attention with all logits."""
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = (q @ k.mT * scale + bias).softmax(-1) @ v
    return out.transpose(1, 2).reshape(query.shape)


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_alibi():
    slopes, query, key = (
        2.0 ** -torch.arange(1, 5).double(),
        torch.arange(5, 12.0).double(),
        torch.arange(12.0).double(),
    )
    query_factor, key_factor = alibi_factors(slopes, query, key)
    assert query_factor.shape == (4, 7, 2) and key_factor.shape == (4, 12, 2)
    expected = slopes[:, None, None] * (key[None, :] - query[:, None])
    assert_same(query_factor @ key_factor.mT, expected)


@pytest.mark.parametrize("shape", [(9,), (4, 7), (2, 3, 5)])
@pytest.mark.parametrize("per_axis", [False, True])
def test_squared_distance(shape, per_axis):
    weights = double(3, len(shape)) if per_axis else double(3)
    keys = tuple(n + 1 for n in shape)
    query, key = grid_positions(shape, dtype=torch.float64), grid_positions(keys, dtype=torch.float64)
    factors = squared_distance_factors(weights, query, key)
    squares = (query[:, None] - key[None]).square()  # [queries, keys, axes]
    weights = weights if per_axis else weights[:, None].expand(-1, len(shape))
    assert factors[0].shape[-1] == len(shape) + 2
    assert_same(factors[0] @ factors[1].mT, torch.einsum("qka,ha->hqk", squares, weights))


def test_grid_positions_are_in_c_order():
    expected = [[-0.5, -1.0], [-0.5, 0.0], [-0.5, 1.0], [0.5, -1.0], [0.5, 0.0], [0.5, 1.0]]
    assert torch.equal(grid_positions((2, 3)), torch.tensor(expected))


def test_axis_tables():
    rows, columns = double(2, 3, 4), double(2, 5, 6)
    query_factor, key_factor = axis_factors([rows, columns])
    assert query_factor.shape == (2, 15, 8) and key_factor.shape == (2, 24, 8)
    expected = rows[:, :, None, :, None] + columns[:, None, :, None, :]  # [heads, y, x, y', x']
    assert_same(query_factor @ key_factor.mT, expected.reshape(2, 15, 24))


@pytest.mark.parametrize("rank", [1, 5, 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_truncation_is_as_good_as_it_says_and_no_rank_is_better(rank, dtype):
    bias = double(3, 20, 17).to(dtype)
    factors = factorize(bias, rank=rank)
    missing = bias.double() - factors.query.double() @ factors.key.double().mT
    singular = torch.linalg.svdvals(bias.double())
    best = (singular[:, rank:].square().sum(1) / singular.square().sum(1)).sqrt().max().item()  # Eckart and Young
    precision = 1e-12 if dtype == torch.float64 else 1e-5
    assert factors.rank == rank and factors.query.dtype == torch.promote_types(dtype, torch.float32)
    assert factors.relative_error == pytest.approx(best, abs=precision)
    assert factors.max_error == pytest.approx(missing.abs().max().item(), abs=precision)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.995])
def test_energy_keeps_the_smallest_rank(energy):
    bias = double(3, 20, 17)
    factors = factorize(bias, energy=energy)
    assert factors.relative_error <= math.sqrt(1 - energy)
    assert factorize(bias, rank=factors.rank - 1).relative_error > math.sqrt(1 - energy)


def test_without_rank_and_energy_nothing_is_lost():
    positions = grid_positions((6, 5), dtype=torch.float64)
    bias = (positions[:, None] - positions[None]).square().sum(-1)  # of rank 4
    factors = factorize(bias)
    assert factors.rank == 4 and factors.query.shape == (1, 30, 4)
    assert factors.max_error < 1e-12
    assert factorize(torch.zeros(4, 5)).max_error == 0


def test_truncated_bias_moves_attention_by_no_more_than_twice_its_error():
    """Changing logits by at most e changes softmax weights by a factor within exp(2 e)."""
    q, k, v = (double(2, 4, 5, 3, 8) for _ in range(3))
    bias = double(3, 20, 20)
    factors = factorize(bias, rank=16)
    out = biased_attention(q, k, v, query_factor=factors.query, key_factor=factors.key)
    moved = (out - dense(q, k, v, bias)).abs().max().item()
    assert 0 < moved <= math.expm1(2 * factors.max_error) * v.abs().max().item()


@pytest.mark.parametrize("scale", [None, 0.3, -1.0])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_biased_attention(scale, rank):
    query, (key, value) = double(2, 3, 4, 3, 5), double(2, 2, 7, 3, 5)
    query_factor, key_factor = double(3, 12, rank), double(3, 7, rank)
    got = biased_attention(query, key, value, query_factor=query_factor, key_factor=key_factor, scale=scale)
    assert_same(got, dense(query, key, value, query_factor @ key_factor.mT, scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_long_positions_survive_half_precision(dtype):
    """Positions up to 2,000 take more bits than half precision has."""
    query, key, value = (torch.randn(1, 2000, 2, 16).to(dtype) for _ in range(3))
    factors = alibi_factors(torch.tensor([0.5, 0.25]), torch.arange(2000.0), torch.arange(2000.0))
    exact = dense(query.double(), key.double(), value.double(), factors[0].double() @ factors[1].double().mT)
    out = biased_attention(query, key, value, query_factor=factors[0], key_factor=factors[1])
    assert (out.double() - exact).abs().max() < 8 * torch.finfo(dtype).eps


def test_heads_may_share_factors():
    query, key, value = double(3, 1, 9, 4, 8)
    factors = double(2, 1, 9, 2)
    got = biased_attention(query, key, value, query_factor=factors[0], key_factor=factors[1])
    assert_same(got, dense(query, key, value, factors[0] @ factors[1].mT))


def test_widened_head_dims_are_multiples_of_eight():
    query, key = double(2, 1, 9, 4, 5)
    for rank, width in ((1, 8), (3, 8), (4, 16), (11, 16), (12, 24)):
        wide_query, wide_key = widen(query, key, double(4, 9, rank), double(4, 9, rank))
        assert wide_query.shape == wide_key.shape == (1, 9, 4, width)
        assert (wide_query[..., 5 + rank :] == 0).all()


def test_scaled_dot_product_attention_takes_widened_operands():
    query, key, value = double(3, 2, 9, 4, 8)
    query_factor, key_factor = double(2, 4, 9, 3)
    q, k = (x.transpose(1, 2) for x in widen(query, key, query_factor, key_factor, scale=0.7))
    got = scaled_dot_product_attention(q, k, value.transpose(1, 2), scale=1.0).transpose(1, 2)
    assert_same(got, dense(query, key, value, query_factor @ key_factor.mT, 0.7))


def test_neighborhood_attention_takes_widened_operands():
    """A bias of absolute positions, which no table of relative positions expresses."""
    shape, weights = (7, 9), double(2)
    query, key, value = double(3, 2, *shape, 2, 4)
    positions = grid_positions(shape, dtype=torch.float64)
    wide = widen(query, key, *squared_distance_factors(weights, positions, positions * 0.9))
    got = na2d(*wide, pad_head_dim(value, wide[1].shape[-1]), window=(3, 5), dilation=(2, 1), scale=1.0)[..., :4]
    bias = weights[:, None, None] * (positions[:, None] - 0.9 * positions[None]).square().sum(-1)
    seen = mask(make_axes(shape, window=(3, 5), dilation=(2, 1)))
    assert_same(got, dense(query, key, value, bias.masked_fill(~seen, float("-inf"))))


def test_windows_take_a_factorized_bias():
    """A learned bias of a window: its factors, tiled over the grid."""
    query, key, value = double(3, 2, 6, 12, 2, 4)
    bias = relative_bias(double(2, 5, 7), window=(3, 4))
    factors = factorize(bias)
    query_factor, key_factor = (tile_factor(f, window=(3, 4), shape=(6, 12)) for f in (factors.query, factors.key))
    wide_query, wide_key = widen(query, key, query_factor, key_factor)
    wide_value = pad_head_dim(value, wide_key.shape[-1])
    expected = window_attention(query, key, value, window=(3, 4), bias=bias)
    wide = (wide_query, wide_key, wide_value)
    assert_same(window_attention(*wide, window=(3, 4), scale=1.0)[..., :4], expected)
    assert_same(na2d(*wide, window=(3, 4), stride=(3, 4), scale=1.0)[..., :4], expected)


def test_gradients_reach_everything():
    inputs = [double(1, 5, 2, 3).requires_grad_() for _ in range(3)]
    slopes, table = double(2).requires_grad_(), double(2, 5, 5).requires_grad_()
    positions = torch.arange(5.0).double()

    def attend(query, key, value, slopes, table):
        pairs = alibi_factors(slopes, positions, positions), axis_factors([table])
        query_factor, key_factor = (torch.cat(x, dim=-1) for x in zip(*pairs, strict=True))
        return biased_attention(query, key, value, query_factor=query_factor, key_factor=key_factor)

    assert torch.autograd.gradcheck(attend, (*inputs, slopes, table))


def test_gradients_reach_distance_weights():
    positions = grid_positions((2, 3), dtype=torch.float64).requires_grad_()

    def bias(weights, positions):
        query, key = squared_distance_factors(weights, positions, positions * 0.5)
        return query @ key.mT

    assert torch.autograd.gradcheck(bias, (double(2).requires_grad_(), positions))


def test_compiles_whole():
    torch._dynamo.reset()
    query, key, value = torch.randn(3, 2, 4, 5, 3, 8)
    factors = dict(query_factor=torch.randn(3, 20, 2), key_factor=torch.randn(3, 20, 2))
    compiled = torch.compile(biased_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, value, **factors), biased_attention(query, key, value, **factors))


BIAS = torch.zeros(2, 5, 4)
FACTORIZE = {
    "axes": (BIAS[0, 0], {}, r"bias \(\(4,\), torch\.float32\)"),
    "integer": (BIAS.long(), {}, r"torch\.int64\) must be floating"),
    "both": (BIAS, {"rank": 1, "energy": 0.5}, "rank=1 and energy=0.5 exclude"),
    "rank": (BIAS, {"rank": 5}, r"rank=5 must lie in \[1, min\(queries, keys\)=4\]"),
    "no rank": (BIAS, {"rank": 0}, "rank=0"),
    "energy": (BIAS, {"energy": 1.5}, "energy=1.5"),
    "mask": (BIAS - torch.inf, {}, "must be finite"),
}


@pytest.mark.parametrize(("bias", "options", "message"), FACTORIZE.values(), ids=FACTORIZE.keys())
def test_factorize_refuses(bias, options, message):
    with pytest.raises(ValueError, match=message):
        factorize(bias, **options)


X, F = torch.zeros(1, 6, 2, 4), torch.zeros(2, 6, 3)
CALLS = {
    "heads": (lambda: widen(X, X, F, F[:0]), r"key_factor\.shape=\(0, 6, 3\)"),
    "tokens": (lambda: widen(X, X, F[:, :5], F), r"query_factor\.shape=\(2, 5, 3\).*tokens=6"),
    "rank": (lambda: widen(X, X, F, F[..., :2]), r"key_factor\.shape=\(2, 6, 2\) must have the rank"),
    "dtype": (lambda: widen(X, X, F.long(), F), r"query_factor \(torch\.int64"),
    "head_dim": (lambda: widen(X, X[..., :3], F, F), r"\(1, 6, 2, 4\) and \(1, 6, 2, 3\)"),
    "value": (lambda: biased_attention(X, X, X[:, :5], query_factor=F, key_factor=F), r"value of \(1, 5, 2, 4\)"),
    "pad": (lambda: pad_head_dim(X, 3), "head_dim=3 must be at least"),
    "slopes": (lambda: alibi_factors(F, F[0, :, 0], F[0, :, 0]), r"slopes\.shape=\(2, 6, 3\)"),
    "positions": (lambda: squared_distance_factors(F[:, 0, 0], F[0], F[0, :, :2]), r"\(6, 3\) and \(6, 2\)"),
    "weights": (lambda: squared_distance_factors(F[:, 0, :2], F[0], F[0]), r"weights\.shape=\(2, 2\)"),
    "tables": (lambda: axis_factors([]), "at least one"),
    "tiling": (lambda: tile_factor(F, window=(2, 3), shape=(4, 8)), r"shape=\(4, 8\) must be a multiple"),
    "tile": (lambda: tile_factor(F, window=(2, 2), shape=(4, 8)), r"factor\.shape=\(2, 6, 3\)"),
}


@pytest.mark.parametrize(("call", "message"), CALLS.values(), ids=CALLS.keys())
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
