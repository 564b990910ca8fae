"""The tiled path against the fp64 reference and NATTEN's recordings, and what it promises besides values."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from foveal.kernels.common import calling
from foveal.kernels.neighborhood import api, dense, make_axes, tiled, tiled_plan
from foveal.kernels.neighborhood.heads import head_groups
from foveal.kernels.neighborhood.tiled import SMALL_BYTES
from foveal.kernels.ops import na1d, na2d, na3d
from neighborhood_matrix import (
    LAYOUTS,
    OPERATORS,
    Case,
    cases,
    check,
    check_heads,
    check_masked_tokens,
    check_part,
    check_without_lse,
    gradients,
    make_inputs,
    masked_cases,
    run,
)
from recorded_natten import RECORDED, RECORDED_BIAS, assert_recorded, recorded_inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

PLAIN = Case((13, 11), (5, 3), (1, 1), (2, 3), (False, False), heads=4, key_heads=2, bias=True, extra=3)
MASKED = replace(PLAIN, batch=2, value_dim=5, additional_mask="mask", seed=3)
WHOLE = Case((5, 14), (5, 7), (1, 3), (1, 2), (False, False), batch=2, heads=2, bias=True)
ALIKE = {"stride": 1, "dilation": 1, "causal": False}
STRIDED = Case((9, 16), (4, 8), (3, 4), (2, 1), (True, False), batch=2, seed=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_random_cases(rank, dtype):
    for case in cases(rank, 300, seed=0):
        check(case, dtype, "torch")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_windows_that_are_whole_dilation_groups(rank, dtype):
    for case in cases(rank, 100, seed=11):
        shape = tuple(w * d for w, d in zip(case.window, case.dilation, strict=True))
        check_without_lse(
            replace(case, shape=shape, causal=(False,) * rank, extra=0, additional_mask=""), dtype, "torch"
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_small_dilation_groups(rank, dtype):
    for case in cases(rank, 100, seed=12):
        shape = tuple(n // d * d for n, d in zip(case.shape, case.dilation, strict=True))
        check_without_lse(replace(case, shape=shape, bias=False, extra=0, additional_mask=""), dtype, "torch")


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_queries_that_are_a_part_of_the_grid(rank, impl):
    for case in cases(rank, 60, seed=9):
        check_part(case, torch.float64, impl)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_windows_per_head(rank, impl):
    for case in cases(rank, 25, seed=13):
        check_heads(case, torch.float64, impl)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_masked_extra_keys_go_nowhere(rank, impl):
    for case in masked_cases(rank, 10, seed=14):
        check_masked_tokens(case, torch.float32, impl)


def test_heads_of_one_neighborhood_are_views_of_few_calls():
    def slices(heads: int, key_heads: int, *windows: int) -> list[tuple[slice, slice]]:
        return [group[1:] for group in head_groups((9,), heads, key_heads, window=[(w,) for w in windows], **ALIKE)]

    assert slices(4, 4, 3, 3, 3, 3) == [(slice(0, 4, 1), slice(0, 4, 1))]
    assert slices(6, 6, 3, 5, 3, 5, 3, 7) == [
        (slice(0, 6, 2), slice(0, 6, 2)),
        (slice(1, 5, 2), slice(1, 5, 2)),
        (slice(5, 6, 1), slice(5, 6, 1)),
    ]
    assert slices(6, 2, 3, 3, 5, 5, 5, 5) == [  # key heads are shared by three
        (slice(0, 2, 1), slice(0, 1, 1)),
        (slice(2, 3, 1), slice(0, 1, 1)),
        (slice(3, 6, 1), slice(1, 2, 1)),
    ]


@pytest.mark.parametrize("operator", [na2d, partial(na2d, return_lse=True)])
def test_flattened_tokens_of_one_projection(operator):
    """The same bits as on the grid, from views of the projection."""
    projected = torch.randn(2, 9 * 8, 3 * 4 * 6, requires_grad=True)
    tokens = [x.unflatten(-1, (4, 6)) for x in projected.chunk(3, dim=-1)]
    on_grid = [x.unflatten(1, (9, 8)) for x in tokens]
    flat, whole = operator(*tokens, window=(3, 5), grid=(9, 8)), operator(*on_grid, window=(3, 5))
    flat, whole = (x if isinstance(x, tuple) else (x,) for x in (flat, whole))
    for x, y in zip(flat, whole, strict=True):
        assert x.shape == (2, 72, *y.shape[3:]) and torch.equal(x, y.flatten(1, 2))
    (first,), (second,) = (torch.autograd.grad(x[0].square().sum(), projected) for x in (flat, whole))
    assert torch.equal(first, second)
    for name, x in zip(("query", "key", "value"), tokens, strict=True):
        assert calling.on_grid(name, x, 2, (9, 8)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_random_cases_in_half_precision(rank, dtype):
    for case in cases(rank, 60, seed=1):
        check(case, dtype, "torch")


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("config", RECORDED, ids=lambda c: f"{c['id']}-{c['tag']}")
def test_recorded_natten(config, impl):
    *qkv, grad = recorded_inputs(config)
    qkv = [x.requires_grad_() for x in qkv]
    options = {name: tuple(config[name]) for name in ("window", "stride", "dilation")}
    out, lse = OPERATORS[config["rank"]](*qkv, **options, causal=tuple(config["is_causal"]), impl=impl)
    found = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *torch.autograd.grad(out, qkv, grad)), strict=True))
    for name, key in config["out_keys"].items():
        assert_recorded(found[name], "neighborhood.npz", key)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("config", RECORDED_BIAS, ids=lambda c: str(c["id"]))
def test_recorded_natten_with_bias(config, impl):
    *qkv, grad, bias = recorded_inputs(config, (2, *(2 * w - 1 for w in config["window"])))
    inputs = [x.requires_grad_() for x in (*qkv, bias)]
    operator = {1: na1d, 2: na2d, 3: na3d}[len(config["shape"])]
    out = operator(*qkv, window=config["window"], dilation=config["dilation"], bias=bias, impl=impl)
    found = dict(zip(("out", "dq", "dk", "dv", "drpb"), (out, *torch.autograd.grad(out, inputs, grad)), strict=True))
    for name, key in config["keys"].items():
        assert_recorded(found[name], "neighborhood_rpb.npz", key)


@pytest.mark.parametrize(
    "case",
    [
        Case((5, 4), (3, 3), (1, 2), (1, 1), (False, True), heads=2, key_heads=1, head_dim=3, bias=True, extra=2),
        Case((7,), (2,), (2,), (3,), (False,), head_dim=2),
        Case((2, 3, 3), (2, 2, 3), (1, 2, 1), (1, 1, 1), (True, False, False), heads=1, key_heads=1, head_dim=2),
    ],
    ids=["2d", "1d", "3d"],
)
def test_gradcheck(case):
    inputs = {name: x for name, x in make_inputs(case, torch.float64).items() if x is not None}

    def operator(*tensors):
        return OPERATORS[case.rank](**dict(zip(inputs, tensors, strict=True)), **case.options, impl="torch")

    assert torch.autograd.gradcheck(operator, tuple(inputs.values()))


def test_second_derivative_is_refused():
    inputs = make_inputs(replace(PLAIN, bias=False, extra=0), torch.float64)
    out = na2d(*(inputs[x] for x in ("query", "key", "value")), window=3, impl="torch")
    (grad,) = torch.autograd.grad(out.square().sum(), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_bits(layout):
    inputs = make_inputs(replace(PLAIN, layout=layout), torch.float32)
    packed = {
        name: x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for name, x in inputs.items()
    }
    got, expected = (run(PLAIN, x, "torch") for x in (inputs, packed))
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def forget_tables() -> None:
    for cached in (tiled_plan.cached_plan, tiled_plan._cached_chunks):
        cached.cache_clear()


def test_tables_of_a_traced_call_are_not_kept():
    forget_tables()
    with FakeTensorMode():
        fake = torch.empty(2, 13, 11, 2, 8)
        assert na2d(fake, fake, fake, window=5, impl="torch").shape == fake.shape
    check(replace(PLAIN, seed=5), torch.float32, "torch")


def test_tables_do_not_follow_the_default_device():
    forget_tables()
    inputs = make_inputs(PLAIN, torch.float32)
    with torch.device("meta"):
        out, _ = na2d(**inputs, **PLAIN.options, impl="torch", return_lse=True)
    assert torch.equal(out, run(PLAIN, inputs, "torch")["out"])


def test_tables_made_in_inference_mode_serve_training():
    forget_tables()
    with torch.inference_mode():
        na2d(**make_inputs(PLAIN, torch.float32), **PLAIN.options, impl="torch", return_lse=True)
    check(PLAIN, torch.float32, "torch")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["key", "value"])
def test_a_bad_number_stays_in_its_neighborhood(name, bad):
    from foveal.kernels.neighborhood import geometry

    for case in (replace(PLAIN, extra=0), replace(STRIDED, batch=1), Case((40,), (31,), (1,), (1,), (False,))):
        clean = {x: None if t is None else t.detach() for x, t in make_inputs(case, torch.float32).items()}
        poisoned = dict(clean)
        poisoned[name] = clean[name].clone()
        token = poisoned[name].flatten(1, -3).shape[1] // 2
        poisoned[name].flatten(1, -3)[:, token] = bad
        sees = geometry.mask(case.axes)[:, token].view(case.shape)
        operator = OPERATORS[case.rank]
        (out, lse), (expected, expected_lse) = (operator(**x, **case.options, impl="torch") for x in (poisoned, clean))
        assert torch.equal(out[0][~sees], expected[0][~sees]) and torch.equal(lse[0][~sees], expected_lse[0][~sees])
        assert not out[0][sees].isfinite().all(-1).any()


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("meta")], ids=["inference", "meta"])
def test_what_is_kept_of_a_small_map_serves_every_mode(mode):
    dense._mask.cache_clear()
    query, key, value = torch.randn(3, 1, 7, 7, 2, 8)
    expected = na2d(query, key, value, window=5, impl="reference")
    with mode():
        first = na2d(query, key, value, window=5)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(na2d(query.requires_grad_(), key, value, window=5), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["key", "value"])
def test_a_bad_number_stays_in_its_neighborhood_of_a_small_map(name, bad):
    tensors = dict(zip(("query", "key", "value"), torch.randn(3, 2, 8, 8, 2, 16).unbind(), strict=True))
    tensors[name][1, 1, 2] = bad
    with_lse, _ = na2d(**tensors, window=5, impl="torch", return_lse=True)
    torch.testing.assert_close(na2d(**tensors, window=5, impl="torch"), with_lse, equal_nan=True)


@pytest.mark.parametrize(
    "shape, options",
    [
        ((14, 14), {"window": 7}),
        ((9, 12), {"window": (5, 7), "causal": (True, False), "stride": (2, 1)}),
        ((12, 20), {"window": (5, 7), "dilation": 2}),
        ((20, 20), {"window": 11}),
    ],
)
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_a_bias_without_gradient_is_part_of_the_mask_of_a_small_map(shape, options, kind, monkeypatch):
    reference = api.dispatch
    monkeypatch.setattr(api, "dispatch", None)  # nothing but dense attention computes the calls under test
    axes = make_axes(shape, **options)
    query, key, value = torch.randn(3, 2, *shape, 4, 8, requires_grad=True).unbind()
    bias = torch.randn(4, *[2 * a.window - 1 for a in axes]).to(kind)
    out = na2d(query, key[..., :2, :], value[..., :2, :], bias=bias, **options)
    wide = [x.double() for x in (query, key[..., :2, :], value[..., :2, :])]
    call = {"axes": axes, "scale": None, "bias": bias.double(), "additional_keys": None, "additional_values": None}
    expected, _ = reference(*wide, **call, impl="reference")
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (query, key, value), grad)
    for x, y in zip(found, torch.autograd.grad(expected, (query, key, value), grad.double()), strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_bad_bias_of_a_small_map(bad):
    query, key, value = torch.randn(3, 1, 9, 9, 2, 8).unbind()
    bias = torch.randn(2, 9, 9)
    bias[1, 0, 4] = bad
    expected = na2d(query, key, value, window=5, bias=bias, impl="reference")
    torch.testing.assert_close(na2d(query, key, value, window=5, bias=bias), expected, equal_nan=True)


def test_a_wider_bias_is_not_rounded_in_the_mask_of_a_small_map():
    query, key, value = torch.randn(3, 1, 9, 9, 2, 8).unbind()
    assert not dense.serves(make_axes((9, 9), window=5), query, key, value, torch.randn(2, 9, 9).double(), None)


def test_a_bad_number_stays_in_its_dilation_group():
    query, key, value = torch.randn(3, 1, 6, 10, 2, 8)
    value[0, 3, 4] = float("nan")
    out = na2d(query, key, value, window=(3, 5), dilation=2, impl="torch")
    sees = torch.zeros(6, 10, dtype=torch.bool)
    sees[1::2, ::2] = True
    assert torch.equal(out.isnan().all(-1).all(-1)[0], sees) and torch.equal(out.isnan().any(-1).any(-1)[0], sees)


def test_large_windows_are_cut_into_chunks_of_heads():
    check(
        Case((40, 40), (31, 31), (1, 1), (1, 1), (False, False), heads=8, key_heads=4, head_dim=4),
        torch.float32,
        "torch",
    )


def test_masks_without_classes(monkeypatch):
    """Grids whose masks are too many to keep make them per chunk."""
    monkeypatch.setattr(tiled_plan, "CLASS_ELEMENTS", 0)
    forget_tables()
    for case in (PLAIN, STRIDED, *cases(3, 10, seed=7)):
        check(case, torch.float32, "torch")
    forget_tables()


@pytest.mark.parametrize("window", range(1, 12))
def test_boxes_hold_the_windows_of_their_tile(window):
    from foveal.kernels.neighborhood.geometry import window_bounds

    for stride in range(1, window + 1):
        for tile in (1, 2, 3, 4, 7):
            for causal in (False, True):
                box = tiled_plan.box_length(window, stride, causal, tile)
                for n in range(window, 40):
                    for first in range(0, n, tile):
                        lo, _ = window_bounds(first, n, window, stride, causal)
                        _, hi = window_bounds(min(first + tile, n) - 1, n, window, stride, causal)
                        assert hi - lo <= box


def peak_bytes(call) -> int:
    """Most that is allocated at a time during a call, its results included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    records = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for record in sorted(records, key=lambda e: e.start_ns()):
        now += record.nbytes()
        peak = max(peak, now)
    assert result is not None
    return peak


@pytest.mark.parametrize("side, window, heads", [(14, 13, 1), (28, 27, 1), (28, 25, 4), (64, 16, 4)])
def test_half_precision_is_cut_as_float32_is(side, window, heads):
    """Tiles of one query made windows that are nearly the map 15 to 33 times slower in half precision."""

    def cut(dtype: torch.dtype):
        x = torch.empty(1, side, side, heads, 64, dtype=dtype)
        return tiled._make_plan(x, x, x, None, make_axes((side, side), window=window))

    plans = [cut(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert len({(plan.tile, plan.box) for plan in plans}) == 1
    assert plans[0].queries >= 16


@pytest.mark.parametrize("window", [7, 13, 28])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_bounded_by_inputs_and_output(window, dtype):
    q, k, v, grad = torch.randn(4, 1, 56, 56, 4, 32, dtype=dtype).unbind()
    qkv = [x.clone().requires_grad_() for x in (q, k, v)]

    def both():
        out = na2d(*qkv, window=window, impl="torch")
        return out.detach(), *torch.autograd.grad(out, qkv, grad)

    both()  # tables are made once
    size = 4 * q.numel() * q.itemsize
    with torch.no_grad():
        assert peak_bytes(lambda: na2d(*qkv, window=window, impl="torch")) <= 3.25 * size  # the output and 3 times all
    assert peak_bytes(both) <= 4 * size  # output, gradients and 3 times all


@pytest.mark.parametrize("side", [9, 14, 28])
def test_memory_of_a_small_map_is_bounded(side):
    q, k, v, grad = torch.randn(4, 1, side, side, 8, 32).unbind()
    qkv = [x.clone().requires_grad_() for x in (q, k, v)]

    def both():
        out, lse = na2d(*qkv, window=7, impl="torch", return_lse=True)
        return out.detach(), *torch.autograd.grad((out, lse), qkv, (grad, lse.detach()))

    both()
    assert peak_bytes(both) <= 4 * 4 * q.numel() * q.itemsize + SMALL_BYTES


def compiled(case: Case, dynamic: bool):
    counter = CompileCounterWithBackend("aot_eager")

    def operator(**tensors):
        return OPERATORS[case.rank](**tensors, impl="torch")

    return torch.compile(operator, fullgraph=True, dynamic=dynamic, backend=counter), counter


def assert_compiled_equals_eager(operator, case: Case) -> None:
    inputs = make_inputs(case, torch.float32)
    got = gradients(inputs, *operator(**inputs, **case.options), seed=case.seed + 1)
    for name, expected in run(case, inputs, "torch").items():
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", [PLAIN, STRIDED, WHOLE], ids=["plain", "strided", "whole"])
def test_compiled_as_one_operator(case):
    torch._dynamo.reset()
    operator, counter = compiled(case, dynamic=False)
    assert_compiled_equals_eager(operator, case)
    called = [node.target for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.foveal.neighborhood_torch_forward) == 1
    assert torch.bmm not in called


def test_compile_dynamic_does_not_recompile():
    torch._dynamo.reset()
    operator, counter = compiled(PLAIN, dynamic=True)
    for shape in ((14, 12), (25, 16), (19, 31), (40, 22)):
        assert_compiled_equals_eager(operator, replace(PLAIN, shape=shape, bias=False, extra=0))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["mask", "lengths"])
def test_compiled_once_for_any_mask(kind):
    """Of whatever is visible, and of heads whose windows differ."""
    torch._dynamo.reset()
    inputs, counter = make_inputs(replace(MASKED, bias=False), torch.float32), CompileCounterWithBackend("aot_eager")
    options = {"window": [(5, 3), (3, 3), (5, 3), (3, 3)], "impl": "torch"}
    operator = torch.compile(partial(partial(na2d, return_lse=True), **options), fullgraph=True, backend=counter)
    for lengths in ([3, 0], [1, 2], [0, 0]):
        mask = torch.tensor(lengths)
        if kind == "mask":
            mask = torch.arange(3).flip(0) < mask[:, None]
        got, expected = (
            operator(**inputs, additional_mask=mask),
            na2d(**inputs, **options, additional_mask=mask, return_lse=True),
        )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


class Exported(torch.nn.Module):
    def forward(self, query, key, value, bias):
        return na2d(query, key, value, window=3, dilation=(2, 1), bias=bias, impl="torch", return_lse=True)


class ExportedTokens(torch.nn.Module):
    """Flattened tokens, heads of two windows, masked extra keys, wide values."""

    def __init__(self, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid

    def forward(self, query, key, value, additional_keys, additional_values, lengths):
        extra = {"additional_keys": additional_keys, "additional_values": additional_values, "additional_mask": lengths}
        return na2d(query, key, value, window=[(3, 3), (5, 1)], grid=self.grid, **extra, impl="torch")


def test_export_of_tokens_heads_and_lengths_is_aten():
    inputs = (
        *torch.randn(2, 2, 99, 2, 8),
        torch.randn(2, 99, 2, 12),
        torch.randn(2, 4, 2, 8),
        torch.randn(2, 4, 2, 12),
    )
    model = ExportedTokens((9, 11))
    exported = torch.export.export(model, (*inputs, torch.tensor([4, 1])))
    calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert {call.namespace for call in calls if isinstance(call, torch._ops.OpOverload)} == {"aten"}
    for lengths in (torch.tensor([4, 1]), torch.tensor([0, 2])):
        torch.testing.assert_close(exported.module()(*inputs, lengths), model(*inputs, lengths), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_export_is_aten(dynamic):
    def inputs(*shape):
        return (*(torch.randn(1, *shape, 2, 8) for _ in range(3)), torch.randn(2, 5, 5))

    axes = {1: torch.export.Dim("height", min=8, max=512), 2: torch.export.Dim("width", min=8, max=512)}
    shapes = (axes, axes, axes, None) if dynamic else None
    exported = torch.export.export(Exported(), inputs(12, 11), dynamic_shapes=shapes)
    calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    operators = {call.namespace for call in calls if isinstance(call, torch._ops.OpOverload)}
    assert operators == {"aten"}
    assert all(
        isinstance(call, torch._ops.OpOverload) or call.__module__ in ("_operator", "torch", "math") for call in calls
    )
    for shape in ((12, 11), (20, 17))[: 1 + dynamic]:
        given = inputs(*shape)
        for got, expected in zip(exported.module()(*given), Exported()(*given), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_windows_of_any_size_in_one_compiled_graph():
    """A whole window whose sizes are symbols, as in a model whose layers have several."""

    def attend(query, key, value, window):
        return na3d(query, key, value, window=window)

    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    for n in (3, 4, 5):
        inputs = torch.randn(3, 1, n, n, n, 2, 8)
        torch.testing.assert_close(compiled(*inputs, n), attend(*inputs, n))
