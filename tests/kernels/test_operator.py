"""A declared operator: schema from its call, gradients, fakes, FLOPs, compiled graphs, choice of implementation."""

import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from foveal.kernels.common.operator import FUNCTIONS, OPERATORS, Operator
from foveal.kernels.common.schema import codec
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


class Shift(NamedTuple):
    length: int
    shift: int
    open: bool
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class Call:
    axes: tuple[Shift, ...]
    scale: float
    bias: Tensor | None = None
    pair: tuple[Tensor, Tensor] | None = None
    block: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None


def _logits(query, key, call):
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * call.scale + sum(axis.shift for axis in call.axes)
    return logits if call.bias is None else logits + call.bias[:, None, None]


def attend(query, key, value, call):
    logits = _logits(query, key, call)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value), logits.logsumexp(-1).transpose(1, 2)


def backward(query, key, value, outs, grads, call, wanted):
    probabilities = _logits(query, key, call).softmax(-1)
    dv = torch.einsum("bhqk,bqhd->bkhd", probabilities, grads[0])
    dp = torch.einsum("bqhd,bkhd->bhqk", grads[0], value)
    delta = (grads[0] * outs[0]).sum(-1) - grads[1]
    ds = probabilities * (dp - delta.transpose(1, 2)[..., None])
    dq = torch.einsum("bhqk,bkhd->bqhd", ds, key) * call.scale
    dk = torch.einsum("bhqk,bqhd->bkhd", ds, query) * call.scale
    return dq, dk, dv, ds.sum((0, 2, 3)) if wanted[0] else None


@pytest.fixture(scope="module")
def kernels():
    """The module of every implementation of the toy."""
    return SimpleNamespace(attend=attend, forward=attend, backward=backward)


@pytest.fixture(scope="module")
def toy(kernels):
    operator = Operator(
        "toy",
        package="toy",
        call=Call,
        differentiable=("bias",),
        flops=lambda query, key, value, call: (4 * query.numel() * key.shape[1], 10 * query.numel() * key.shape[1]),
        graph="torch",
        title="toy attention",
    )
    operator.module = lambda impl: kernels
    yield operator
    del OPERATORS["toy"]


def inputs(requires_grad=True):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 6, 3, 4, dtype=torch.float64) for _ in range(3)] + [torch.randn(3, dtype=torch.float64)]
    return [x.requires_grad_(requires_grad) for x in tensors]


AXES = (Shift(6, 1, True), Shift(1, 2, False))


@pytest.mark.parametrize(
    "call",
    [
        Call(AXES, 0.5),
        Call(AXES, 0.5, torch.zeros(3), (torch.zeros(1), torch.ones(1)), (2, 3), torch.float16),
        Call(tuple(axis._replace(part=(0, i)) for i, axis in enumerate(AXES, 1)), 0.5),
        Call((AXES[0]._replace(part=(0, 2)), AXES[1]), 0.5),
        Call((AXES[0], AXES[1]._replace(part=(0, 0))), 0.5),
    ],
)
def test_a_call_survives_its_arguments(call):
    found = codec(Call)
    arguments = found.flatten(call)
    assert len(arguments) == len(found.arguments)
    assert found.build(arguments) == call


def test_schema(toy):
    schema = str(torch.ops.foveal.toy_forward.default._schema)
    assert "SymInt[] axes_length, SymInt[] axes_shift, bool[] axes_open, SymInt[]? axes_part, float scale" in schema
    assert "Tensor? bias, Tensor? pair_0, Tensor? pair_1, SymInt[]? block, ScalarType? dtype" in schema


@pytest.mark.parametrize("kind", [dict, tuple[str, ...], Tensor | int])
def test_types_without_schema_are_refused(kind):
    with pytest.raises((TypeError, ValueError)):
        codec(kind)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients(toy, impl, with_bias):
    *tensors, bias = inputs()
    call = Call(AXES, 0.5, bias if with_bias else None)
    leaves = [*tensors, bias] if with_bias else tensors
    direct, through = attend(*tensors, call), toy.dispatch(impl, *tensors, call)
    for a, b in zip(direct, through, strict=True):
        torch.testing.assert_close(b, a)
    losses = [(out.sin().sum() + lse.sum()) for out, lse in (direct, through)]
    for a, b in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        torch.testing.assert_close(b, a)


def test_no_gradient_is_made_for_a_frozen_bias(toy, kernels, monkeypatch):
    seen = []
    monkeypatch.setattr(kernels, "backward", lambda *args: seen.append(args[-1]) or backward(*args))
    *tensors, bias = inputs()
    toy.dispatch("triton", *tensors, Call(AXES, 0.5, bias.detach()))[0].sum().backward()
    assert seen == [[False]]


def test_a_gradient_that_nobody_asked_for_is_dropped(toy, kernels, monkeypatch):
    monkeypatch.setattr(kernels, "backward", lambda *arguments: backward(*arguments[:-1], [True]))
    query, key, value, bias = inputs(False)
    arguments = toy.codec.flatten(Call(AXES, 0.5, bias))
    outputs = torch.ops.foveal.toy_forward(query, key, value, *arguments)
    grads = [torch.ones_like(x) for x in outputs]
    sizes = [
        torch.ops.foveal.toy_backward(query, key, value, *outputs, *grads, *arguments, [want])[-1].numel()
        for want in (True, False)
    ]
    assert sizes == [bias.numel(), 0]


def test_double_backward_is_refused_by_name(toy):
    *tensors, _ = inputs()
    out, _ = toy.dispatch("triton", *tensors, Call(AXES, 0.5))
    with pytest.raises(NotImplementedError, match="toy attention has no double backward"):
        torch.autograd.grad(out.sum(), tensors[0], create_graph=True)[0].sum().backward()


def test_a_call_that_the_kernels_do_not_take(toy, monkeypatch):
    """Refused with the reason of the declaration where it is asked for, else in plain PyTorch."""
    pytest.importorskip("triton")
    monkeypatch.setattr(toy, "unsupported", lambda *arguments: None if arguments[-1].bias is None else "a bias")
    with FakeTensorMode():
        query, bias = torch.empty(2, 6, 3, 4, device="cuda"), torch.empty(3, device="cuda")
    plain, biased = Call(AXES, 0.5), Call(AXES, 0.5, bias)
    assert [toy.select_impl(query, query, query, call) for call in (plain, biased)] == ["triton", "torch"]
    assert toy.unsupported_reasons(query, query, query, biased)["triton"] == "a bias"
    with pytest.raises(NotImplementedError, match="impl='triton' cannot take this call: a bias"):
        toy.select_impl(query, query, query, biased, "triton")


def test_opcheck(toy):
    *tensors, bias = inputs()
    arguments = toy.codec.flatten(Call(AXES, 0.5, bias, (torch.zeros(1), torch.ones(1)), (2, 3)))
    torch.library.opcheck(torch.ops.foveal.toy_forward.default, (*tensors, *arguments))


def test_compiled_as_one_operator_with_symbolic_lengths(toy):
    calls = []

    def backend(graph, example):
        calls.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def compiled(query, key, value, bias):
        axes = (Shift(query.shape[1], 1, True), Shift(1, 2, False))
        return toy(query, key, value, Call(axes, 0.5, bias))[0]

    *tensors, bias = inputs(requires_grad=False)
    for n in (5, 4, 3):
        query, key, value = (x[:, :n] for x in tensors)
        expected, _ = attend(query, key, value, Call(AXES, 0.5, bias))
        torch.testing.assert_close(compiled(query, key, value, bias), expected)
    assert len(calls) == 1, "compiled again for another length"
    assert sum("foveal.toy_torch_forward" in target for target in calls[0]) == 1


def test_flops(toy):
    *tensors, bias = inputs()
    with FlopCounterMode(display=False) as counter:
        toy.dispatch("triton", *tensors, Call(AXES, 0.5, bias))[0].sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.foveal.toy_forward] == 4 * 2 * 6 * 3 * 4 * 6
    assert counts[torch.ops.foveal.toy_backward] == 10 * 2 * 6 * 3 * 4 * 6


def test_choice_of_implementation(toy):
    *tensors, _ = inputs(requires_grad=False)
    call = Call(AXES, 0.5)
    assert toy.select_impl(*tensors, call) == "torch"
    assert toy.select_impl(*tensors, call, "reference") == "reference"
    with pytest.raises(NotImplementedError, match="impl='triton' cannot take this call"):
        toy.select_impl(*tensors, call, "triton")
    with pytest.raises(ValueError, match="impl='fast'"):
        toy.select_impl(*tensors, call, "fast")


def test_public_functions_are_registered(toy):
    @toy.public(lambda query, key, value: Call(AXES, 0.5), summarize=lambda query, key, value, call, impl: {"n": 1})
    def toy_attention(query, key, value):
        """A function."""

    operator, make_call, summarize = FUNCTIONS.pop("toy_attention")
    assert operator is toy and make_call(None, None, None) == Call(AXES, 0.5)
    assert summarize(None, None, None, None, None) == {"n": 1}


@pytest.mark.parametrize("impl", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
def test_traced_whole_before_the_first_call(impl):
    """No graph breaks where an implementation is looked up, in a process that has called none."""
    code = f"""
import torch
from foveal.kernels.ops import BlockMask, block_sparse_attention, na2d

def attend(x, number, listed):
    mask = BlockMask((2, 2), (2, 2), number, listed)
    return na2d(x, x, x, window=3, stride=2, impl="{impl}"), block_sparse_attention(x, x, x, mask=mask, impl="{impl}")

lists = torch.ones(1, 1, 4, dtype=torch.int32), torch.zeros(1, 1, 4, 1, dtype=torch.int32)
torch.compile(attend, fullgraph=True, backend="eager")(torch.randn(1, 4, 4, 2, 8), *lists)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
