"""Window attention in plain PyTorch against the fp64 reference, and the rule of windows against its definition."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from foveal.kernels.ops import explain, relative_bias, window_attention
from foveal.kernels.window import Axis, geometry
from operator_matrix import LAYOUTS, gradients
from torch._dynamo.testing import CompileCounterWithBackend
from window_matrix import Case, cases, check, make_inputs, run

SHIFTED = Case((14, 9), (4, 3), (2, 1), (0, 0), heads=4, key_heads=2, bias=True, batch=2)
HALO = Case((7, 9), (3, 4), (0, 0), (2, 1), bias=True)
EVEN = Case((12, 16), (4, 8), (0, 0), (0, 0), bias=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_random_cases(rank, dtype):
    for case in cases(rank, 120, seed=0):
        check(case, dtype, "torch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_random_cases_in_half_precision(rank, dtype):
    for case in cases(rank, 40, seed=1):
        check(case, dtype, "torch")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_without_lse(training, dtype):
    """Without log-sum-exp, large windows take PyTorch's fused attention."""
    for case in (
        *cases(2, 40, seed=2),
        Case((24, 24), (12, 12), (5, 6), (0, 0)),
        Case((24, 24), (8, 8), (0, 0), (3, 3)),
    ):
        inputs = {
            n: x if x is None else x.detach().requires_grad_(training) for n, x in make_inputs(case, dtype).items()
        }
        outs = [window_attention(**inputs, **case.options, impl=impl) for impl in ("torch", "reference")]
        found = [gradients(inputs, out, None, 3) if training else {"out": out} for out in outs]
        for name, exact in found[1].items():
            torch.testing.assert_close(found[0][name], exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [1, 20])
def test_a_bias_is_not_rounded_to_half_precision(training, size):
    case = Case((14, 14), (7, 7), (0, 0), (0, 0), heads=4, key_heads=4, head_dim=32, bias=True)
    inputs = make_inputs(case, torch.bfloat16)
    bias = size * torch.randn(inputs["bias"].shape)
    grids = {name: x.detach().requires_grad_(training) for name, x in inputs.items() if name != "bias"}
    out = window_attention(**grids, bias=bias, **case.options, impl="torch")
    exact = window_attention(**{n: x.double() for n, x in grids.items()}, bias=bias, **case.options, impl="reference")
    assert (out.double() - exact).abs().max() <= exact.abs().max() * 2**-8


@pytest.mark.parametrize("case", [replace(SHIFTED, shape=(5, 4), batch=1, head_dim=2), replace(HALO, head_dim=2)])
def test_gradcheck(case):
    inputs = {name: x for name, x in make_inputs(case, torch.float64).items() if x is not None}

    def operator(*tensors):
        return window_attention(
            **dict(zip(inputs, tensors, strict=True)), **case.options, impl="torch", return_lse=True
        )

    assert torch.autograd.gradcheck(operator, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_values(layout):
    inputs = make_inputs(replace(SHIFTED, layout=layout), torch.float32)
    packed = {
        name: x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for name, x in inputs.items()
    }
    got, expected = (run(SHIFTED, x, "torch") for x in (inputs, packed))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["key", "value"])
def test_a_bad_number_stays_in_its_window(name, bad):
    for case in (replace(SHIFTED, batch=1), HALO, EVEN):
        clean = {x: t.detach() for x, t in make_inputs(case, torch.float32).items()}
        token = 37
        poisoned = clean | {name: clean[name].clone()}
        poisoned[name].view(1, -1, *clean[name].shape[-2:])[:, token] = bad
        sees = geometry.mask(case.axes)[:, token].view(case.shape)
        outs = [window_attention(**x, **case.options, impl="torch", return_lse=True) for x in (poisoned, clean)]
        for got, expected in zip(*outs, strict=True):
            assert torch.equal(got[0][~sees], expected[0][~sees])
        assert 0 < sees.sum() < sees.numel() and not outs[0][0][0][sees].isfinite().all(-1).any()


def test_runs_are_the_definition():
    for length in range(1, 20):
        for window in range(1, length + 1):
            plain = [(shift, 0, False) for shift in range(window)]
            for shift, halo, padded in plain + [(0, h, p) for h in range(1, 6) for p in (False, True)]:
                axis = Axis(length, window, shift, halo, padded)
                slots = torch.full((length, length + 2 * axis.margin), -1)
                covered = 0
                for r in geometry.runs(axis):
                    assert r.query == covered
                    for j in range(r.count):
                        query, key = r.query + j * window, r.key + j * window
                        expected = geometry.axis_places(axis)[1][query : query + r.queries]
                        assert torch.equal(expected, torch.arange(r.slot, r.slot + r.queries)), axis
                        slots[query : query + r.queries, key : key + r.keys] = torch.arange(r.keys) + r.key_slot
                    covered = r.query + (r.count - 1) * window + r.queries
                assert covered == length and torch.equal(slots, geometry.axis_key_slots(axis)), axis


def test_shifted_windows_are_those_of_the_rolled_grid():
    """Swin's definition: roll, partition, mask tokens that were not neighbours, roll back."""
    query, key, value = torch.randn(3, 1, 8, 12, 2, 4, dtype=torch.float64)
    rolled = [x.roll((-1, -2), (1, 2)).unflatten(1, (2, 4)).unflatten(3, (3, 4)) for x in (query, key, value)]
    q, k, v = (x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5) for x in rolled)  # [B, 2, 3, heads, 16, d]
    bias = torch.randn(2, 16, 16, dtype=torch.float64)
    region = torch.zeros(8, 12)
    region[-1:] += 1
    region[:, -2:] += 2
    region = region.unflatten(0, (2, 4)).unflatten(2, (3, 4)).transpose(1, 2).flatten(2)
    logits = q @ k.transpose(-1, -2) / 2 + bias
    logits = logits.masked_fill((region[..., None] != region[..., None, :])[None, :, :, None], float("-inf"))
    out = (logits.softmax(-1) @ v).unflatten(4, (4, 4)).permute(0, 1, 4, 2, 5, 3, 6).reshape(query.shape)
    got = window_attention(query, key, value, window=4, shift=(1, 2), bias=bias)
    torch.testing.assert_close(got, out.roll((1, 2), (1, 2)))


def test_relative_bias():
    table = torch.randn(2, 2 * (3 + 1) - 1, 2 * (4 + 2) - 1)
    bias = relative_bias(table, window=(3, 4), halo=(1, 2)).view(2, 3, 4, 5, 8)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in (3, 4, 5, 8))).tolist():
        y, x, ky, kx = index
        assert torch.equal(bias[:, y, x, ky, kx], table[:, ky - 1 - y + 3, kx - 2 - x + 5])
    with pytest.raises(ValueError, match=r"table\.shape=\(2, 7, 11\)"):
        relative_bias(table, window=(3, 4))


def compiled(dynamic: bool):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(
        partial(window_attention, return_lse=True), fullgraph=True, dynamic=dynamic, backend=counter
    ), counter


@pytest.mark.parametrize("case", [SHIFTED, *(pytest.param(case, marks=pytest.mark.slow) for case in (HALO, EVEN))])
def test_compile(case):
    torch._dynamo.reset()
    check(case, torch.float32, "torch", operator=compiled(False)[0])


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [((16,), (24,), (44,)), ((16, 24), (20, 33), (32, 18))], ids=["1d", "2d"])
def test_compile_dynamic_does_not_recompile(shapes):
    """Sizes of one kind: the window divides them."""
    torch._dynamo.reset()
    operator, counter = compiled(True)
    for shape in shapes:
        case = Case(shape, (4, 3)[: len(shape)], (2, 1)[: len(shape)], (0, 0)[: len(shape)], bias=True)
        check(case, torch.float32, "torch", operator=operator)
    assert counter.frame_count == 1


class Exported(torch.nn.Module):
    def forward(self, query, key, value, bias):
        return window_attention(query, key, value, window=4, shift=2, bias=bias, impl="torch")


def test_export_is_aten():
    def inputs(length):
        return (*torch.randn(3, 1, length, 2, 8), torch.randn(2, 4, 4))

    axes = {1: 4 * torch.export.Dim("windows", min=3, max=64)}
    exported = torch.export.export(Exported(), inputs(12), dynamic_shapes=(axes, axes, axes, None))
    calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert {call.namespace for call in calls if isinstance(call, torch._ops.OpOverload)} == {"aten"}
    given = inputs(24)
    torch.testing.assert_close(exported.module()(*given), Exported()(*given), rtol=1e-5, atol=1e-5)


Q = torch.zeros(1, 6, 8, 2, 4)
WIDE = torch.zeros(1, 8, 10, 2, 4)
WRONG = {
    "window over axis": ((Q, Q, Q), {"window": 7}, ValueError, r"window=7 on axis 0 must lie in \[1, length=6\]"),
    "window zero": ((Q, Q, Q), {"window": (2, 0)}, ValueError, "window=0 on axis 1"),
    "window float": ((Q, Q, Q), {"window": 2.0}, TypeError, r"window=2\.0"),
    "window count": ((Q, Q, Q), {"window": (2, 2, 2)}, ValueError, "has 3 values"),
    "shift": ((Q, Q, Q), {"window": 2, "shift": (0, 2)}, ValueError, r"shift=2 on axis 1 must lie in \[0, window=2\)"),
    "halo": ((Q, Q, Q), {"window": 2, "halo": -1}, ValueError, "halo=-1 on axis 0"),
    "both": ((Q, Q, Q), {"window": 2, "shift": 1, "halo": (0, 1)}, ValueError, r"shift=\(1, 1\) cannot be combined"),
    "bias": ((Q, Q, Q), {"window": 2, "bias": torch.zeros(2, 4, 9)}, ValueError, r"bias\.shape=\(2, 4, 9\)"),
    "bias dtype": ((Q, Q, Q), {"window": 2, "bias": torch.zeros(2, 4, 4).long()}, ValueError, r"torch\.int64"),
    "wide keys": ((Q, WIDE, WIDE), {"window": 2}, ValueError, r"key has a grid of \(8, 10\)"),
    "wrong margin": ((Q, WIDE, WIDE), {"window": 2, "halo": 2}, ValueError, r"larger by halo=\(2, 2\)"),
    "value": ((Q, Q, WIDE), {"window": 2}, ValueError, r"value\.shape=\(1, 8, 10, 2, 4\)"),
    "rank": ((Q[0, 0], Q, Q), {"window": 2}, ValueError, r"query has shape \(8, 2, 4\)"),
    "key heads": ((Q, Q[..., :1, :2], Q[..., :1, :2]), {"window": 2}, ValueError, r"key\.shape=\(1, 6, 8, 1, 2\)"),
    "list": (([1.0], Q, Q), {"window": 2}, TypeError, "query must be a tensor"),
    "impl": ((Q, Q, Q), {"window": 2, "impl": "cuda"}, ValueError, "impl='cuda'"),
    "triton": ((Q, Q, Q), {"window": 2, "impl": "triton"}, NotImplementedError, "cpu"),
}


@pytest.mark.parametrize(("tensors", "options", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(tensors, options, error, message):
    with pytest.raises(error, match=message):
        window_attention(*tensors, **options)


def test_explain():
    q = torch.empty(2, 56, 56, 3, 32, device="meta")
    found = explain(window_attention, q, q, q, window=7, shift=3)
    assert found.impl == "torch" and found.cost["windows"] == 64
    along = 7 * 49 + 9 + 16  # pairs of an axis: seven whole windows, one of 3 tokens, one of 4
    assert found.cost["visible_pairs"] == along**2
    assert found.cost["forward_flops"] == 4 * along**2 * 2 * 3 * 32
