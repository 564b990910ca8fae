"""Values may be wider or narrower than keys: attention acts on every feature of a value alike."""

import pytest
import torch
from foveal.kernels import ops
from foveal.kernels.common.operator import FUNCTIONS
from foveal.kernels.tools.explain import explain
from operator_calls import CALLS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

WITHOUT_VALUES = (
    "calibrate_skip",
    "skipped_blocks",
    "merge_attentions",
    "relative_bias",
    "scan_order",
    "long_convolution",
)
NAMES = [name for name in CALLS if name not in WITHOUT_VALUES and not name.startswith("na")]
IMPLS = [(name, impl) for name in NAMES for impl in ((None,) if name == "biased_attention" else ("torch", "reference"))]
WIDTHS = (3, 20)  # of keys: 8
VALUES = ("value", "additional_values", "state")


def is_floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def widened(call: dict, width: int, dtype: torch.dtype = torch.float64) -> dict:
    """The arguments of a call with values of another width, floating tensors in `dtype`."""
    call = {n: x.to(dtype) if is_floating(x) else x for n, x in call.items()}
    for name in VALUES:
        if name in call:
            call[name] = torch.randn(*call[name].shape[:-1], width, dtype=dtype)
    return call


def part(call: dict, features: slice) -> dict:
    """The call with some features of the values, and eight in all: the rest is zero."""
    values = {name: call[name][..., features] for name in VALUES if name in call}
    return call | {name: torch.nn.functional.pad(x, (0, 8 - x.shape[-1])) for name, x in values.items()}


def outputs(name: str, call: dict, impl: str | None) -> tuple[Tensor, ...]:
    found = getattr(ops, name)(**call, **({} if impl is None else {"impl": impl}))
    return (found,) if isinstance(found, Tensor) else found


@pytest.mark.parametrize("name, impl", IMPLS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_feature_is_that_of_narrow_values(name, impl, width):
    call = widened(CALLS[name](), width)
    leaves = {n: x.requires_grad_() for n, x in call.items() if is_floating(x)}
    out, *lse = outputs(name, call, impl)
    assert out.shape == (*call["query"].shape[:-1], width) and out.dtype == torch.float64
    slices = [slice(i, min(i + 8, width)) for i in range(0, width, 8)]
    parts = [outputs(name, part(call, s), impl) for s in slices]
    expected = torch.cat([p[0][..., : s.stop - s.start] for p, s in zip(parts, slices, strict=True)], -1)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for x in lse:
        torch.testing.assert_close(x, parts[0][1], rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(out)
    grads = [torch.autograd.grad(x, [*leaves.values()], cotangent) for x in (out, expected)]
    for argument, got, exact in zip(leaves, *grads, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10, msg=lambda text, n=argument: f"{n}: {text}")


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_lse")])
def test_compiled_whole(name):
    call = widened(CALLS[name](), 20, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, name), fullgraph=True, backend="aot_eager")
    for x in ("query", "value"):
        call[x].requires_grad_()
    results = []
    for operator in (compiled, getattr(ops, name)):
        found = operator(**call)
        out = found if isinstance(found, Tensor) else found[0]
        results.append((out, *torch.autograd.grad(out.square().sum(), (call["query"], call["value"]))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name in FUNCTIONS])
def test_explained(name):
    same, wide = (explain(name, **widened(CALLS[name](), width)).cost for width in (8, 24))
    if name not in ("linear_attention", "scan_attention"):  # logits and outputs: 8 and 8 features, or 8 and 24
        logits = 8 + (3 if name == "biased_attention" else 0)  # and the rank of the bias
        assert wide["forward_flops"] / same["forward_flops"] == (logits + 24) / (logits + 8)
        assert wide["backward_flops"] / same["backward_flops"] == (3 * logits + 2 * 24) / (3 * logits + 2 * 8)
    assert wide["forward_bytes"] > same["forward_bytes"] and wide["backward_bytes"] > same["backward_bytes"]


def test_values_too_wide_for_kernels():
    pytest.importorskip("triton")
    with FakeTensorMode():
        query, value = (torch.empty(1, 8, 8, 2, d, dtype=torch.bfloat16, device="cuda") for d in (64, 320))
        narrow, wide = (explain(ops.window_attention, query, query, x, window=4) for x in (query, value))
    assert (narrow.impl, wide.impl) == ("triton", "torch")
    assert wide.reasons["triton"] == "head_dim 320 of value exceeds 256"
