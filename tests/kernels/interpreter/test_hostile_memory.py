"""Every Triton kernel, run by Triton's interpreter, on memory and orders of programs that no device promises.

Results must be the same bits when programs run in another order, when memory that was never written holds NaN, and when
tensors lie in the midst of NaN. They must show NaN of any payload, and read and write numbers 2^31 and more apart.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from declared import DECLARED, Declared
from foveal.kernels.agent.forward import merge_kernel
from foveal.kernels.linear import launch as linear_launch
from foveal.kernels.ops import (
    BlockMask,
    agent_attention,
    block_sparse_attention,
    linear_attention,
    na2d,
    scan_attention,
    scored_attention,
    window_attention,
)
from foveal.kernels.scan import passes
from foveal.kernels.scored import ColumnMask, Softmax
from hostile import ROUND, assert_same, embed, nan_in_empty, shuffled
from operator_matrix import Inputs
from torch import Tensor
from triton.runtime import interpreter

QUICK = (  # by default; all others are slow
    "test_hostile_memory_is_hostile",
    *(f"test_not_a_number_shows_whatever_its_payload[{name}" for name in ("block_sparse", "window")),
    "test_linear_attention_shows",
)
CANONICAL = 0x7FFFFFFF  # the NaN that NVIDIA's units make; NumPy's is 0x7FC00000


def launch_of(name: str):
    return import_module(f"foveal.kernels.{name}.launch")


def configs_of(name: str):
    return import_module(f"foveal.kernels.{name}.configs")


def is_small(case) -> bool:
    """Whether a case has few programs, of which one takes the interpreter about ten milliseconds."""
    tokens = prod(case.shape), prod(getattr(case, "key_shape", None) or ()), getattr(case, "agents", 1)
    groups = prod(getattr(case, "dilation", ())) * prod(2 * h + 1 for h in getattr(case, "halo", ()))
    boxes = getattr(case, "query_boxes", 1), getattr(case, "key_boxes", 1)
    return 0 < case.batch * case.heads <= 2 and max(tokens) <= 48 and max(groups, *boxes) <= 6


@contextmanager
def hostile(seed: int) -> Iterator[None]:
    """Inside the block programs of a launch run in a random order, and `torch.empty` holds NaN."""
    with shuffled(seed), nan_in_empty():
        yield


def check(name: str, case, forced: Mapping[str, Any]) -> None:
    inputs = DECLARED[name].matrix.make_inputs(case, torch.float32)
    with configs_of(name).override(**forced):
        expected = DECLARED[name].matrix.run(case, inputs, "triton")
        with hostile(case.seed):
            got = DECLARED[name].matrix.run(case, {n: embed(x) for n, x in inputs.items()}, "triton")
    assert_same(got, expected, case)


@pytest.mark.parametrize("name", DECLARED)
def test_order_and_memory_change_nothing(name):
    for i, case in enumerate(DECLARED[name].cases):
        check(name, case, DECLARED[name].forced if i else {})


@pytest.mark.parametrize("name", DECLARED)
def test_order_and_memory_change_nothing_in_random_cases(name):
    matrix, ranks, forced = DECLARED[name].matrix, DECLARED[name].ranks, DECLARED[name].forced
    for rank in ranks:
        cases = matrix.cases(*(() if rank is None else (rank,)), 10**6, seed=11)
        for i, case in enumerate(islice(filter(is_small, cases), 12)):
            check(name, case, forced if i % 2 else {})


def test_hostile_memory_is_hostile():
    with hostile(0):
        assert torch.empty(3).isnan().all()
        builder = interpreter.interpreter_builder
        builder.set_grid_dim(9, 1, 1)
        seen = []
        for x in range(9):
            builder.set_grid_idx(x, 0, 0)
            seen.append(builder.grid_idx[0])
    assert sorted(seen) == list(range(9)) != seen
    embedded = embed(torch.randn(2, 3).t())
    assert embedded.stride() == (1, 3) and torch.isnan(embedded.as_strided((1,), (1,), ROUND - 1)).all()


def place(x: Tensor, bits: int) -> Tensor:
    """A copy with one NaN of these bits, in the middle."""
    x = x.detach().clone()
    middle = tuple(n // 2 for n in x.shape)
    x[middle] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert x[middle].view(torch.int32) == bits
    return x


def poisoned(declared: Declared, case, inputs: Inputs, name: str, bits: int) -> dict[str, Tensor]:
    """Results with one NaN in an input or, for the name "grad", in the gradient that comes back."""
    given = {n: place(x, bits) if n == name else x for n, x in inputs.items()}
    given = {n: None if x is None else x.detach().requires_grad_() for n, x in given.items()}

    def operator(**arguments):
        found = declared.public(case)(**arguments)
        out, *rest = (found,) if isinstance(found, Tensor) else found
        factor = torch.ones_like(out)
        out = out * (place(factor, bits) if name == "grad" else factor)
        return (out, *rest) if rest else out

    return declared.matrix.run(case, given, "triton", operator=operator)


@pytest.fixture
def tf32(monkeypatch):
    """As if products of float32 were allowed to take TF32, and states did, as on NVIDIA's devices."""
    for name in DECLARED:
        monkeypatch.setattr(passes if name == "scan" else launch_of(name), "precision", lambda query: "tf32")
    monkeypatch.setattr(linear_launch, "state_precision", lambda query, precision: "tf32")


@pytest.mark.parametrize("name", DECLARED)
def test_not_a_number_shows_whatever_its_payload(name, tf32):
    declared, case = DECLARED[name], DECLARED[name].cases[-1]
    inputs = declared.matrix.make_inputs(case, torch.float32)
    for tensor in [*(n for n, x in inputs.items() if x is not None), "grad"]:
        found, expected = (poisoned(declared, case, inputs, tensor, bits) for bits in (CANONICAL, 0x7FC00000))
        assert_same(found, expected, (tensor, case))
        assert found["out"].isnan().any(), (tensor, case)


@pytest.mark.parametrize("bits", [CANONICAL, 0x7FC00000, 0x7F800000])  # the last is infinity
def test_linear_attention_shows_what_plain_products_show(bits, tf32):
    inputs = dict(zip(("query", "key", "value"), torch.randn(3, 1, 16, 16, 2, 32), strict=True))
    inputs["value"] = place(inputs["value"].abs(), 0x7FC00000)
    inputs["value"].view(torch.int32)[inputs["value"].isnan()] = bits
    got, exact = (linear_attention(**inputs, impl=impl) for impl in ("triton", "torch"))
    assert not exact.isfinite().all()
    assert torch.equal(got.isnan(), exact.isnan()) and torch.equal(got.isinf(), exact.isinf())


class Far:
    """Tensors in files without content: tokens or features of one are 2^31 numbers apart, and no memory is taken."""

    def __init__(self, folder: Path):
        self.folder, self.made = folder, 0

    def file(self, numbers: int) -> Tensor:
        self.made += 1
        return torch.from_file(str(self.folder / str(self.made)), shared=True, size=numbers, dtype=torch.float32)

    def copy(self, x: Tensor, axis: int) -> Tensor:
        """The values of `x`, the entries along `axis` so far apart that the last is 2^31 numbers from the first."""
        step = 2**31 // (x.shape[axis] - 1) + 1
        strides = list(x.contiguous().stride())
        strides[axis] = step
        inner = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + 1
        return self.file(inner).as_strided(x.shape, strides).copy_(x.detach())


@pytest.fixture
def far(tmp_path, monkeypatch) -> Far:
    """With checks of 32-bit overflow, which come before a process reads where it must not."""
    options = interpreter.InterpreterOptions(sanitize_overflow=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)  # copies storages to themselves
    return Far(tmp_path)


def calls() -> dict[str, Callable]:
    """Operators of query, key and value `[1, 3, 3, 2, 4]`."""
    kv_num, kv_idx = torch.ones(1, 1, 4, dtype=torch.int32), torch.arange(4, dtype=torch.int32).view(1, 1, 4, 1)
    mask = BlockMask((2, 2), (2, 2), kv_num, kv_idx.flip(2))
    agent = torch.randn(1, 2, 2, 4)
    return {
        "neighborhood": lambda q, k, v: na2d(q, k, v, window=2, impl="triton", return_lse=True),
        "window": lambda q, k, v: window_attention(q, k, v, window=2, impl="triton", return_lse=True),
        "block_sparse": lambda q, k, v: block_sparse_attention(q, k, v, mask=mask, impl="triton", return_lse=True),
        "agent": lambda q, k, v: (agent_attention(q, k, v, agent, impl="triton"),),
        "scan": lambda q, k, v: (
            scan_attention(q, k, v, log_decay=-torch.ones(2), direction="backward", impl="triton"),
        ),
        "scored": lambda q, k, v: scored_attention(
            q, k, v, score=Softmax(), mask=ColumnMask.causal(9), return_lse=True, impl="triton"
        ),
        "linear": lambda q, k, v: (linear_attention(q, k, v, relu=True, floor=1.0, impl="triton"),),
    }


@pytest.mark.parametrize("axis", [1, 4], ids=["tokens", "features"])
@pytest.mark.parametrize("name", DECLARED)
def test_numbers_far_apart(name, axis, far):
    call, near = calls()[name], [x.requires_grad_() for x in torch.randn(3, 1, 3, 3, 2, 4).unbind()]
    expected = call(*near)
    cotangents = [torch.randn_like(x) for x in expected]
    expected = dict(enumerate((*expected, *torch.autograd.grad(expected, near, cotangents))))
    apart = [far.copy(x, axis).requires_grad_() for x in near]
    got = call(*apart)
    cotangents[0] = far.copy(cotangents[0], axis)
    got = dict(enumerate((*got, *torch.autograd.grad(got, apart, cotangents))))
    assert_same(got, expected, name)


def test_parts_of_agent_attention_far_apart(far):
    """Nine queries of 2^20 heads of 256 features: the last lies 2^31 numbers behind the first."""
    queries, heads, dim = 9, 2**20, 256
    parts, lse = far.file(2 * queries * heads * dim), far.file(2 * queries * heads)
    out, out_lse = far.file(queries * heads * dim), far.file(queries * heads)
    first = parts.view(2, queries, heads, dim)[:, :, 0].copy_(torch.randn(2, queries, dim))
    merge_kernel[(1,)](
        parts, lse, out, out_lse, queries, 1, heads, 2, DV=dim, BLOCK_DV=dim, QUERIES=16, WIDE=True
    )  # fmt: skip
    torch.testing.assert_close(out.view(queries, heads, dim)[:, 0], first.mean(0))
