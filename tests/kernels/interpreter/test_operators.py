"""Every declared operator's kernels, run by Triton's interpreter: what an operator promises beside its values."""

import math
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
from declared import DECLARED
from foveal.kernels.common.operator import OPERATORS
from operator_matrix import Inputs, assert_same_bits, gradients, opcheck
from torch import Tensor

QUICK = (  # by default; all others are slow
    "test_every_operator",
    "test_any_strides_give_the_same_bits[window-odd",
    *(f"test_memory_around_the_tensors_is_not_read[{name}" for name in ("block_sparse", "window")),
    *(f"test_only_what_requires_a_gradient_gets_one[{name}" for name in ("agent", "window")),
    "test_second_derivatives",
    "test_unknown_overrides",
)


def configs_of(name: str):
    return import_module(f"{OPERATORS[name].package}.configs")


def launches(name: str) -> Iterator[tuple]:
    """Cases with their inputs: under the pinned launch parameters, then under forced ones."""
    declared = DECLARED[name]
    for forced in ({}, declared.forced) if declared.forced else ({},):
        for case in declared.cases:
            with configs_of(name).override(**forced):
                yield case, declared.matrix.make_inputs(case, torch.float32)


def test_every_operator_with_kernels_is_here():
    assert set(DECLARED) == {name for name, operator in OPERATORS.items() if "triton" in operator.modules}


@pytest.mark.parametrize("name", DECLARED)
def test_gradients_are_the_same_bits_every_time(name):
    for case, inputs in launches(name):
        assert_same_bits(lambda case=case, inputs=inputs: DECLARED[name].matrix.run(case, inputs, "triton"), 1)


@pytest.mark.parametrize("name", DECLARED)
def test_memory_around_the_tensors_is_not_read(name):
    """Slices of buffers full of NaN give what copies of them give, to the bit."""

    def inside_nan(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        inside = torch.full([n + 3 for n in x.shape], float("nan"))[tuple(slice(1, 1 + n) for n in x.shape)]
        return inside.copy_(x.detach()).requires_grad_()

    def outcome(inputs: Inputs) -> dict[str, Tensor]:
        outputs = declared.outputs(case, inputs, "triton")
        return gradients(inputs, outputs[0], outputs[1] if len(outputs) > 1 else None, case.seed)

    declared = DECLARED[name]
    case = declared.cases[-1]
    inputs = declared.matrix.make_inputs(case, torch.float32)
    packed = {n: x if x is None else x.detach().contiguous().requires_grad_() for n, x in inputs.items()}
    for got, expected in zip(outcome({n: inside_nan(x) for n, x in inputs.items()}).values(), outcome(packed).values(),
                             strict=True):  # fmt: skip
        assert got.isfinite().all() and torch.equal(got, expected)


def odd(x: Tensor) -> Tensor:
    """The values of `x` in a buffer in which no axis but the last has an even stride, and which begins off 16 bytes."""
    lengths = [*x.shape[:1], *(n + 1 - n % 2 for n in x.shape[1:])]
    buffer = torch.zeros(1 + math.prod(lengths), dtype=x.dtype)[1:].view(lengths)
    return buffer[tuple(map(slice, x.shape))].copy_(x)


def transposed(x: Tensor) -> Tensor:
    """The values of `x` with a stride of 1 on the first axis, as channels-first tensors have it behind the batch."""
    return torch.empty(x.shape[::-1], dtype=x.dtype).permute(*reversed(range(x.dim()))).copy_(x)


@pytest.mark.parametrize("layout", [odd, transposed])
@pytest.mark.parametrize("name", DECLARED)
def test_any_strides_give_the_same_bits(name, layout):
    """Strides may reach kernels in bytes, those of one element excepted: see `launching.kernel_strides`."""
    declared = DECLARED[name]
    case = declared.cases[-1]
    inputs = declared.matrix.make_inputs(case, torch.float16)
    found = []
    for place in (layout, torch.Tensor.contiguous):
        placed = {n: x if x is None else place(x.detach()).requires_grad_() for n, x in inputs.items()}
        outputs = declared.outputs(case, placed, "triton")
        found.append(gradients(placed, outputs[0], outputs[1] if len(outputs) > 1 else None, case.seed))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 3
    found[0].pop("beta", None)  # PyTorch sums it, in an order that follows the layout
    assert all(torch.equal(x, found[1][n]) for n, x in found[0].items())


@pytest.mark.parametrize(("requires_grad", "dtype"), [(False, torch.float16), (True, torch.float32)])
@pytest.mark.parametrize("name", DECLARED)
def test_opcheck(name, requires_grad, dtype):
    """On one case and one of symbolic lengths: what is checked depends on shapes and dtypes, not on the values."""
    declared = DECLARED[name]
    for case in (declared.cases[-1], *declared.sizes[:1]):
        inputs = declared.matrix.make_inputs(case, dtype)
        inputs = {n: x if x is None else x.detach().requires_grad_(requires_grad) for n, x in inputs.items()}
        tensors = [inputs[n] for n in ("query", "key", "value")]
        opcheck(OPERATORS[name], "triton", tensors, declared.matrix.make_call(case, inputs), 1e-2)


@pytest.mark.parametrize("name", DECLARED)
def test_only_what_requires_a_gradient_gets_one(name):
    """And what does gets the same, whether or not the rest does."""
    declared = DECLARED[name]
    case = declared.cases[-1]
    inputs = declared.matrix.make_inputs(case, torch.float32)
    whole = declared.matrix.run(case, inputs, "triton")
    grids = ("query", "key", "value")
    frozen = {n: x if n in grids or x is None else x.detach() for n, x in inputs.items()}
    assert any(x is not None for n, x in frozen.items() if n not in grids)
    out, *rest = declared.outputs(case, frozen, "triton")
    found = gradients({n: inputs[n] for n in grids}, out, rest[0] if rest else None, case.seed + 1)
    assert all(torch.equal(x, whole[n]) for n, x in found.items())


@pytest.mark.parametrize("name", [name for name, declared in DECLARED.items() if declared.sizes])
def test_compiled_whole_for_any_size(name):
    torch._dynamo.reset()
    declared = DECLARED[name]
    compiled = torch.compile(declared.public(declared.sizes[0]), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for case in declared.sizes:
            declared.matrix.check(case, torch.float32, "triton", operator=compiled)


@pytest.mark.parametrize("name", DECLARED)
def test_exported_as_one_operator(name):
    declared = DECLARED[name]
    case = declared.cases[-1]

    class Model(torch.nn.Module):
        def forward(self, **tensors):
            return declared.public(case)(**tensors, **case.options, impl="triton")

    inputs = {n: x.detach() for n, x in declared.matrix.make_inputs(case, torch.float32).items() if x is not None}
    program = torch.export.export(Model(), (), inputs)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(f"foveal.{name}_forward.default") == 1
    torch.testing.assert_close(program.module()(**inputs), Model()(**inputs))


@pytest.mark.parametrize("name", DECLARED)
def test_second_derivatives_are_refused(name):
    declared = DECLARED[name]
    case = declared.cases[0]
    inputs = declared.matrix.make_inputs(case, torch.float32)
    out = declared.outputs(case, inputs, "triton")[0]
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs["query"], create_graph=True)
    with pytest.raises(NotImplementedError, match="has no double backward"):
        torch.autograd.grad(gradient.sum(), inputs["query"])


@pytest.mark.parametrize("name", DECLARED)
def test_unknown_overrides_are_refused(name):
    with pytest.raises(TypeError, match="threads"), configs_of(name).override(threads=3):
        pass
