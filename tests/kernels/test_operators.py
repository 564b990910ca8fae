"""Every declared operator with kernels, in plain PyTorch: what an operator promises beside its values."""

import os

import kernel_checks
import pytest
import torch
from declared import DECLARED
from foveal.kernels.common.operator import FUNCTIONS, OPERATORS
from foveal.kernels.tools import compile_report
from operator_matrix import assert_same_bits, gradients, opcheck
from torch._dynamo.testing import CompileCounterWithBackend

IN_GRAPHS = [name for name, operator in OPERATORS.items() if "torch" in operator.dispatched]
GRIDS = ("query", "key", "value")


def sized(name: str):
    """A case with all options."""
    return DECLARED[name].cases[-1]


def test_every_operator_is_somewhere():
    with_kernels = {name for name, operator in OPERATORS.items() if "triton" in operator.modules}
    assert set(DECLARED) == set(compile_report.OPERATORS) == with_kernels
    assert {public.operator.name for public in FUNCTIONS.values()} == set(OPERATORS)


@pytest.mark.parametrize("name", DECLARED)
def test_repeats_bitwise(name):
    declared = DECLARED[name]
    for case in (*declared.cases, *declared.sizes[:1]):
        inputs = declared.matrix.make_inputs(case, torch.float32)
        assert_same_bits(lambda case=case, inputs=inputs: declared.matrix.run(case, inputs, "torch"), 1)


@pytest.mark.parametrize("name", DECLARED)
def test_autocast_leaves_the_dtype_alone(name):
    declared, case = DECLARED[name], sized(name)
    inputs = declared.matrix.make_inputs(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = declared.outputs(case, inputs, "auto")
    for got, expected in zip(inside, declared.outputs(case, inputs, "auto"), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, expected)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter serves CPU tensors")
@pytest.mark.parametrize("name", DECLARED)
def test_triton_is_not_replaced_in_silence(name):
    case = sized(name)
    with pytest.raises(NotImplementedError, match=r"impl='triton' cannot take this call: .*cpu"):
        DECLARED[name].outputs(case, DECLARED[name].matrix.make_inputs(case, torch.float32), "triton")


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", IN_GRAPHS)
def test_opcheck(name, requires_grad):
    declared = DECLARED[name]
    for case in (*declared.cases, *declared.sizes[:1]):
        inputs = declared.matrix.make_inputs(case, torch.float32)
        inputs = {n: x if x is None else x.detach().requires_grad_(requires_grad) for n, x in inputs.items()}
        call = declared.matrix.make_call(case, inputs)
        opcheck(OPERATORS[name], "torch", [inputs[n] for n in GRIDS], call, 1e-4)


@pytest.mark.parametrize("name", DECLARED)
def test_one_graph_and_gradients_of_what_requires_them(name):
    """Compiled with frozen options: on CPU one operator where the declaration says so."""
    torch._dynamo.reset()
    declared, case, counter = DECLARED[name], sized(name), CompileCounterWithBackend("aot_eager")
    inputs = declared.matrix.make_inputs(case, torch.float32)
    frozen = {n: x if n in GRIDS or x is None else x.detach() for n, x in inputs.items()}
    expected = declared.matrix.run(case, inputs, "torch")
    compiled = torch.compile(declared.public(case), fullgraph=True, backend=counter)
    for operator in (declared.public(case), compiled):
        found = operator(**frozen, **case.options)
        out, *rest = (found,) if isinstance(found, torch.Tensor) else found
        got = gradients({n: inputs[n] for n in GRIDS}, out, rest[0] if rest else None, case.seed + 1)
        for x, value in got.items():
            torch.testing.assert_close(value, expected[x], rtol=1e-4, atol=1e-5)
    (graph,) = counter.graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert called.count(f"foveal.{name}_torch_forward") == (name in IN_GRAPHS)


@pytest.mark.parametrize("name", IN_GRAPHS)
def test_double_backward_of_a_graph_is_refused(name):
    declared, case = DECLARED[name], sized(name)
    inputs = declared.matrix.make_inputs(case, torch.float32)
    found = OPERATORS[name].dispatch("torch", *(inputs[n] for n in GRIDS), declared.matrix.make_call(case, inputs))
    out = found if isinstance(found, torch.Tensor) else found[0]
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs["query"], create_graph=True)
    with pytest.raises(NotImplementedError, match="has no double backward"):
        torch.autograd.grad(gradient.sum(), inputs["query"])


def test_interpreter():
    """Quick tests under `interpreter/`, in a process where Triton interprets its kernels."""
    pytest.importorskip("triton")
    kernel_checks.run_interpreter("test_operators.py")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["opcheck", "not opcheck"])
def test_interpreter_on_everything(part):
    kernel_checks.run_interpreter("test_operators.py", part, marker="slow")


@pytest.mark.exhaustive
@pytest.mark.parametrize("operator", ["agent", "block_sparse", "neighborhood"])
def test_interpreter_on_all_random_cases(operator):
    kernel_checks.run_interpreter(f"test_{operator}_kernels.py", "random", marker="exhaustive")
