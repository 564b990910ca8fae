"""Scan attention: the plain path against the fp64 reference, its defining properties, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from foveal.kernels.ops import explain, long_convolution, scan_attention, scan_order
from foveal.kernels.scan import chunked, cost
from operator_matrix import LAYOUTS
from scan_matrix import Case, cases, check, make_inputs
from torch import Tensor
from torch.nn import functional as F

RECORDED = np.load(Path(__file__).parents[1] / "goldens" / "scans.npz")
GATED = Case((7, 11), batch=2, decay="token", delta=True, state=True, value_dim=5)
ADDED = replace(GATED, delta=False, direction="backward")
GRID = (1, 6, 5, 2)


def recorded(name: str) -> Tensor:
    return torch.from_numpy(RECORDED[name]).double()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("dtype", "number"), [(torch.float64, 60), (torch.float32, 60), (torch.bfloat16, 20), (torch.float16, 20)], ids=str
)
def test_random_cases(dtype, number):
    for case in cases(number, seed=0):
        check(case, dtype, "torch")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_more_random_cases(dtype):
    for case in cases(300, seed=1):
        check(case, dtype, "torch")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    check(replace(GATED, layout=layout), torch.float64, "torch")


@pytest.mark.parametrize("case", [GATED, ADDED], ids=["delta", "additive"])
def test_chunks_of_any_size_agree(case, monkeypatch):
    for chunk in (1, 5, 77):
        monkeypatch.setattr(chunked, "CHUNK", chunk)
        check(case, torch.float64, "torch")


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_the_quadratic_form(direction, impl):
    """Every pair of tokens once, decayed by what lies between them."""
    query, key, value = (random(*GRID, 4, seed=i) for i in range(3))
    decay = -random(*GRID, seed=3).abs()
    q, k, v, g = (x.flatten(1, 2) for x in (query, key, value, decay))
    sums = g.cumsum(1)
    forward = (sums[:, :, None] - sums[:, None]).exp()  # over the tokens after the key, up to the query
    shifted = sums - g
    backward = (shifted[:, None] - shifted[:, :, None]).exp()  # from the query on, before the key
    lower = torch.ones(30, 30).tril().bool()[None, :, :, None]
    pairs = {"forward": forward * lower, "backward": backward * lower.transpose(1, 2)}
    pairs["both"] = torch.where(lower, forward, backward)
    expected = 0.3 * torch.einsum("bnmh,bnmh,bmhe->bnhe", pairs[direction], torch.einsum("bnhd,bmhd->bnmh", q, k), v)
    got = scan_attention(query, key, value, log_decay=decay, direction=direction, scale=0.3, impl=impl)
    torch.testing.assert_close(got.flatten(1, 2), expected, rtol=1e-10, atol=1e-12)


def test_both_directions_of_the_delta_rule_add_up():
    query, key, value = (random(*GRID, 4, seed=i) for i in range(3))
    options = {"beta": random(*GRID, seed=3).sigmoid()}
    key = F.normalize(key, dim=-1)
    ways = [scan_attention(query, key, value, direction=way, **options) for way in ("forward", "backward", "both")]
    torch.testing.assert_close(ways[0] + ways[1], ways[2])


def test_a_sequence_in_parts():
    """The state of a part goes into the next; backwards that of the last into the one before."""
    query, key, value = (random(1, 30, 2, 4, seed=i) for i in range(3))
    gates = {"log_decay": -random(1, 30, 2, seed=3).abs(), "beta": random(1, 30, 2, seed=4).sigmoid()}
    key = F.normalize(key, dim=-1)
    for direction, parts in (("forward", [slice(0, 13), slice(13, 30)]), ("backward", [slice(13, 30), slice(0, 13)])):
        whole, last = scan_attention(query, key, value, **gates, direction=direction, return_state=True)
        state = None
        for part in parts:
            own = {name: x[:, part] for name, x in gates.items()}
            tensors = (x[:, part] for x in (query, key, value))
            out, state = scan_attention(*tensors, **own, direction=direction, state=state, return_state=True)
            torch.testing.assert_close(out, whole[:, part])
        torch.testing.assert_close(state, last)


def test_a_small_decay_after_a_large_one():
    """Sums of the decay lie near -1e4, and what decays by 1e-3 between two tokens keeps float32's precision."""
    query, key, value = (random(1, 60, 1, 4, seed=i) for i in range(3))
    decay = torch.full((1, 60, 1), -1e-3, dtype=torch.float64)
    decay[:, 7] = -1e4
    expected = scan_attention(query, key, value, log_decay=decay, impl="reference")
    query, key, value, decay = (x.float() for x in (query, key, value, decay))
    got = scan_attention(query, key, value, log_decay=decay, impl="torch")
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


def test_orthonormal_keys_are_looked_up():
    """With beta 1 what is stored under a key is its last value."""
    key = torch.eye(8, dtype=torch.float64).repeat(2, 1)[None, :, None]
    value = random(1, 16, 1, 3)
    out = scan_attention(key, key, value, beta=torch.ones(1, 16, 1, dtype=torch.float64))
    torch.testing.assert_close(out, value)


def test_full_decay_leaves_the_own_token():
    query, key, value = (random(*GRID, 4, seed=i) for i in range(3))
    out = scan_attention(query, key, value, log_decay=torch.full((2,), -1e3, dtype=torch.float64))
    torch.testing.assert_close(out, (query * key).sum(-1, keepdim=True) * value)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_recorded_decays(impl):
    """flash-linear-attention's recurrence in float32."""
    query, key, value = (recorded(f"decay.{x}") for x in "qkv")
    options = {"log_decay": -recorded("decay.slopes"), "return_state": True, "impl": impl}
    out, state = scan_attention(query, key, value, **options)
    torch.testing.assert_close(out, recorded("decay.out"), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(state, recorded("decay.state"), rtol=1e-5, atol=2e-5)
    gated = scan_attention(query, key, value, log_decay=recorded("decay.log_gate"), impl=impl)
    torch.testing.assert_close(gated, recorded("decay.out_gated"), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_recorded_delta_rule(impl):
    """flash-linear-attention's recurrence in float32, with unit keys."""
    query, key, value, beta = (recorded(f"delta.{x}").transpose(1, 2) for x in ("q", "k", "v", "beta"))
    options = {"beta": beta, "scale": 8**-0.5, "return_state": True, "impl": impl}
    out, state = scan_attention(query, F.normalize(key, dim=-1), value, **options)
    torch.testing.assert_close(out, recorded("delta.out").transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, recorded("delta.state"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [GATED, ADDED], ids=["delta", "additive"])
def test_second_derivative_is_refused(case):
    inputs = make_inputs(replace(case, shape=(5,)), torch.float64)
    out = scan_attention(**inputs)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("kind", ["rows", "columns", "snake_rows", "snake_columns", "gilbert", "segments"])
def test_orders_are_permutations(kind, shape):
    segments = torch.arange(torch.Size(shape).numel()).view(shape) % 3 if kind == "segments" else None
    order, inverse = scan_order(shape, kind, segments=segments)
    tokens = torch.arange(torch.Size(shape).numel())
    assert torch.equal(order.sort().values, tokens) and torch.equal(order[inverse], tokens)
    if kind.startswith("snake"):  # a step at a time
        places = torch.stack(torch.unravel_index(order, shape), -1)
        assert (places.diff(dim=0).abs().sum(-1) == 1).all()


def test_orders_as_published():
    for name, kind in (("rows", "snake_rows"), ("cols", "snake_columns")):
        there, back = RECORDED[f"scans.{name}"].tolist()
        order = scan_order((4, 4), kind)[0].tolist()
        assert order == there and order[::-1] == back


def test_segments_follow_their_first_token():
    segments = torch.tensor([[7, 7, 2], [2, 7, 5]])
    assert scan_order((2, 3), "segments", segments=segments)[0].tolist() == [0, 1, 4, 2, 3, 5]


@pytest.mark.parametrize(("length", "center"), [(1, 0), (9, 0), (9, 4), (40, 21)])
def test_long_convolution_is_a_convolution(length, center):
    x, weights, skip = random(2, 17, 3), random(length, 3, seed=1), random(3, seed=2)
    padded = F.pad(x.mT, (length, length))
    direct = F.conv1d(padded, weights.T.flip(-1)[:, None], groups=3)[..., 1 + center : 18 + center]
    got = long_convolution(x, weights, center=center, skip=skip)
    torch.testing.assert_close(got, direct.mT + skip * x)
    whole = torch.zeros(length, 3, dtype=torch.float64)
    whole[center] = 1
    torch.testing.assert_close(long_convolution(x, whole, center=center), x)


Q = torch.zeros(1, 6, 2, 4)
WRONG = {
    "key": (
        {"key": torch.zeros(1, 5, 2, 4), "value": torch.zeros(1, 5, 2, 4)},
        r"key\.shape=.* must equal query",
    ),
    "decay": ({"log_decay": torch.zeros(1, 5, 2)}, r"log_decay\.shape=\(1, 5, 2\) must be \[heads\] or"),
    "beta of heads": ({"beta": torch.zeros(2)}, r"beta\.shape=\(2,\) must be \[B, \*spatial, heads\] = \(1, 6, 2\)"),
    "direction": ({"direction": "up"}, "direction='up' must be one of"),
    "state": ({"state": torch.zeros(1, 2, 4, 5)}, r"state\.shape=\(1, 2, 4, 5\) must be"),
    "states of both": ({"direction": "both", "return_state": True}, "direction='both' has two states"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG.keys())
def test_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        scan_attention(**{"query": Q, "key": Q, "value": Q, **options})


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="center=3 must be a place of the filter"):
        long_convolution(Q[0], torch.zeros(3, 4), center=3)
    with pytest.raises(ValueError, match="kind='spiral'"):
        scan_order((2, 2), "spiral")
    with pytest.raises(ValueError, match="segments must be given with kind='segments'"):
        scan_order((2, 2), "segments")


def test_explanation_and_cost():
    found = explain("scan_attention", Q, Q, Q, beta=torch.zeros(1, 6, 2), direction="both")
    assert found.impl == "torch" and found.cost["rule"] == "delta"
    sizes = dict(batch=1, tokens=6, heads=2, head_dim=4, value_dim=4)
    assert found.cost["forward_flops"] == cost.forward_flops(**sizes, delta=True, passes=2) == 2 * 6 * 6 * 2 * 16
