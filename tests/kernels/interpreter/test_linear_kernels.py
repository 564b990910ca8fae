"""The Triton kernels of linear attention, run by Triton's interpreter on the CPU."""

from dataclasses import replace
from itertools import islice
from math import prod
from random import Random

import pytest
import torch
from foveal.kernels.linear import configs
from foveal.kernels.ops import linear_attention
from linear_matrix import Case, cases, check, check_large_means, make_inputs, opcheck, run
from operator_matrix import LAYOUTS
from torch.utils.flop_counter import FlopCounterMode

QUICK = (  # by default; all others are slow
    "test_random_cases_match_the_reference[0]",
    "test_large_means",
    "test_memory_around",
    "test_not_a_number",
    "test_only_what",
    "test_flops",
    "test_second_derivatives",
    "test_long_heads",
    "test_unknown_overrides",
)
CASES = 80
CHUNK = 10
FLOOR = Case((5, 7), (4, 6), heads=2, relu=True, floor=20.0, scale=None)
CENTERED = replace(FLOOR, floor=None, centered=True, value_dim=12)


def affordable(case: Case) -> bool:
    """The interpreter takes about five milliseconds a program and step: few slices of few tokens."""
    slices = case.batch * case.heads
    return slices <= 4 and slices * max(prod(case.shape), prod(case.key_shape)) <= 160


def forced(case: Case) -> dict:
    """A launch that this case alone would not take: any tile, several parts, blocks of features, 64-bit offsets."""
    random = Random(case.seed)
    rows = random.choice((16, 32, 64) if max(prod(case.shape), prod(case.key_shape)) <= 48 else (32, 64))
    chunk = random.choice((1, 64, 10**6))
    return dict(rows=rows, chunk=chunk, columns=random.choice((16, 32, 64)), wide=random.random() < 0.3)


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_cases_match_the_reference(first):
    affordable_cases = list(islice(filter(affordable, cases(10**6, seed=1)), CASES))
    for case in affordable_cases[first : first + CHUNK]:
        with configs.override(**forced(case)):
            check(case, torch.float32, "triton")


def test_half_precision_keeps_the_error_rule():
    for case in islice(filter(affordable, cases(10**6, seed=2)), 12):
        check(case, torch.float16, "triton")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_in_place(layout):
    """Every layout gives the bits of a contiguous copy."""
    inputs = make_inputs(replace(FLOOR, layout=layout), torch.float32)
    packed = {n: x.detach().clone(memory_format=torch.contiguous_format) for n, x in inputs.items()}
    out = linear_attention(**inputs, **FLOOR.options, impl="triton")
    assert torch.equal(out, linear_attention(**packed, **FLOOR.options, impl="triton"))


def test_scales_of_any_stride():
    inputs = {name: x.detach() for name, x in make_inputs(FLOOR, torch.float32).items()}
    strided = inputs | {"scale": inputs["scale"].repeat_interleave(3)[::3]}
    outs = [linear_attention(**given, **FLOOR.options, impl="triton") for given in (inputs, strided)]
    assert strided["scale"].stride() == (3,) and torch.equal(*outs)


@pytest.mark.parametrize("case", [FLOOR, CENTERED], ids=["floor", "centered"])
def test_head_dim_128_with_the_pinned_tiles(case):
    check(replace(case, head_dim=128, value_dim=128, heads=1, shape=(20,), key_shape=(17,)), torch.float32, "triton")


@pytest.mark.parametrize("head_dim, value_dim", [(24, 1), (1, 48), (128, 16), (16, 128), (16, 300)])
def test_head_dims_of_keys_and_values_may_differ(head_dim, value_dim):
    case = replace(FLOOR, head_dim=head_dim, value_dim=value_dim, heads=1)
    check(replace(case, scale=1.0), torch.float32, "triton")


def test_large_means_do_not_swallow_the_covariance():
    with configs.override(rows=16, chunk=16):
        check_large_means("triton")


def test_sums_of_float16_past_its_range():
    """65,504 is the largest: states are sums over all keys, and pass it long before the output does."""
    query = torch.full((1, 512, 1, 16), 0.5, dtype=torch.float16)
    key, value = torch.full_like(query, 16.0), torch.full_like(query, 32.0)
    out = linear_attention(query, key, value, eps=1e-6, impl="triton")
    torch.testing.assert_close(out, value)


def test_gradients_are_the_same_bits_every_time():
    for case in (replace(FLOOR, batch=3), replace(CENTERED, batch=3)):
        inputs = make_inputs(case, torch.float32)
        with configs.override(chunk=16, rows=16):
            first, second = run(case, inputs, "triton"), run(case, inputs, "triton")
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", [FLOOR, CENTERED], ids=["floor", "centered"])
def test_memory_around_the_tensors_is_not_read(case):
    """Slices of buffers full of NaN give what copies of them give, to the bit."""

    def inside_nan(*shape):
        buffer = torch.full([n + 3 for n in shape], float("nan"))
        inside = buffer[tuple(slice(1, 1 + n) for n in shape)]
        return inside.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)))

    def outcome(q, k, v, scale):
        leaves = [x.detach().requires_grad_() for x in (q, k, v, scale)]
        options = {name: x for name, x in case.options.items() if name != "scale"}
        out = linear_attention(*leaves[:3], scale=leaves[3], **options, impl="triton")
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    grids = [inside_nan(1, 5, 7, 2, 8) for _ in range(3)]
    scale = torch.tensor([0.5, 2.0])
    for got, expected in zip(outcome(*grids, scale), outcome(*(x.contiguous() for x in grids), scale), strict=True):
        assert got.isfinite().all() and torch.equal(got, expected)


def test_not_a_number_is_not_hidden_by_relu():
    inputs = {name: x.detach() for name, x in make_inputs(replace(FLOOR, scale=1.0), torch.float32).items()}
    inputs["query"][0, 0, 0, 0, 0] = float("nan")
    out = linear_attention(**inputs, **replace(FLOOR, scale=1.0).options, impl="triton")
    assert out[0, 0, 0, 0].isnan().all() and out[0, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("scales", [False, True])
def test_opcheck(dtype, requires_grad, scales):
    case = replace(FLOOR, layout="fused", relu=False, floor=None, eps=1e-3, mean=True)
    opcheck("triton", case, dtype, requires_grad=requires_grad, scales=scales)


def test_only_what_requires_a_gradient_gets_one():
    inputs = make_inputs(FLOOR, torch.float32)
    inputs["scale"].requires_grad_(False)
    linear_attention(**inputs, **FLOOR.options, impl="triton").sum().backward()
    assert inputs["scale"].grad is None and inputs["key"].grad is not None


def test_compiled_whole_for_any_size():
    torch._dynamo.reset()
    compiled = torch.compile(linear_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for shape, key_shape in (((5, 7), (4, 6)), ((11, 3), (13, 5))):
            case = replace(FLOOR, shape=shape, key_shape=key_shape)
            check(case, torch.float32, "triton", operator=compiled)


def test_exported_as_one_operator():
    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return linear_attention(query, key, value, centered=True, impl="triton")

    inputs = (*torch.randn(3, 1, 6, 7, 2, 8),)
    program = torch.export.export(Model(), inputs)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("foveal.linear_forward.default") == 1
    torch.testing.assert_close(program.module()(*inputs), Model()(*inputs))


def test_flops_are_counted():
    inputs = make_inputs(CENTERED, torch.float32)
    with FlopCounterMode(display=False) as counter:
        linear_attention(**inputs, **CENTERED.options, impl="triton").sum().backward()
    assert counter.get_total_flops() == 3 * 2 * CENTERED.heads * 8 * 12 * (35 + 24)


def test_second_derivatives_are_refused():
    inputs = make_inputs(FLOOR, torch.float32)
    out = linear_attention(**inputs, **FLOOR.options, impl="triton")
    with pytest.raises(RuntimeError, match=r"double backward|differentiate"):
        (gradient,) = torch.autograd.grad(out.square().sum(), inputs["query"], create_graph=True)
        torch.autograd.grad(gradient.sum(), inputs["query"])


def test_long_heads_are_refused():
    x = torch.zeros(1, 16, 1, 160)
    with pytest.raises(NotImplementedError, match="head_dim 160 exceeds 128"):
        linear_attention(x, x, x, impl="triton")


def test_unknown_overrides_are_refused():
    with pytest.raises(TypeError, match="queries"), configs.override(queries=3):
        pass
