"""What the test matrices of all operators share: layouts, gradients, and the rule for how exact a result must be."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from foveal.kernels.common.operator import Operator
from torch import Tensor

LAYOUTS = ("contiguous", "heads_first", "channels_first", "fused", "expanded", "offset")
Inputs = dict[str, Tensor | None]


def seeded_randn(seed: int, dtype: torch.dtype, device: str | torch.device) -> Callable[..., Tensor]:
    """`torch.randn` of given sizes whose values follow from the seed, rounded from float64 whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)

    return randn


def lay_out(
    layout: str, randn: Callable[..., Tensor], batch: int, shape: Sequence[int], counts: Sequence[int], head_dim: int
) -> tuple[Tensor, ...]:
    """Random query, key and value `[batch, *shape, heads, head_dim]` with `counts` heads in a memory layout."""
    b, s, d = batch, tuple(shape), head_dim
    if layout == "fused":
        return torch.split(randn(b, *s, sum(counts), d), list(counts), dim=-2)
    if layout == "heads_first":
        return tuple(randn(b, h, *s, d).movedim(1, -2) for h in counts)
    if layout == "channels_first":
        return tuple(randn(b, h, d, *s).movedim((1, 2), (-2, -1)) for h in counts)
    if layout == "expanded":  # stride 0 along the batch, the heads and the first spatial axis
        q, k, v = ([b, *s, h, d] for h in counts)
        q[0], k[-2], v[1] = min(b, 1), 1, 1
        return tuple(randn(*x).expand(b, *s, h, d) for x, h in zip((q, k, v), counts, strict=True))
    if layout == "offset":
        inner = (slice(None), *(slice(1, -1) for _ in s), slice(1, None), slice(1, None))
        return tuple(randn(b, *(n + 2 for n in s), h + 1, d + 1)[inner] for h in counts)
    return tuple(randn(b, *s, h, d) for h in counts)


def as_leaves(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """The same values as fresh leaves that require gradients, in `dtype` unless None; no other tensor is floating."""
    return {name: None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()}


def gradients(inputs: Inputs, out: Tensor, lse: Tensor | None, seed: int) -> dict[str, Tensor]:
    """out, lse and, by the name of each input, its gradient for fixed random gradients of both out and lse."""
    generator = torch.Generator().manual_seed(seed)
    outputs = (out,) if lse is None else (out, lse)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(out.device) for x in outputs]
    # What reaches the operator is rounded to half precision in the same way whatever the dtype of this run.
    cotangents = [g.bfloat16().to(x.dtype) for g, x in zip(cotangents, outputs, strict=True)]
    present = {name: x for name, x in inputs.items() if x is not None}
    grads = torch.autograd.grad(outputs, tuple(present.values()), cotangents)
    found = {name: x.detach() for name, x in (("out", out), ("lse", lse)) if x is not None}
    return found | dict(zip(present, grads, strict=True))


def assert_same_bits(compute: Callable[[], dict[str, Tensor]], times: int) -> None:
    """Assert that `compute` gives the same bits this many times after the first."""
    first = compute()
    for _ in range(times):
        again = compute()
        assert all(torch.equal(first[name], again[name]) for name in first)


def errors(
    got: dict[str, Tensor], exact: dict[str, Tensor], eager: dict[str, Tensor] | None, dtype: torch.dtype
) -> dict[str, tuple[float, float]]:
    """Largest absolute error against fp64, and the error allowed, of out, lse and every gradient.

    float64 may be off by 1e-11 and float32 by 1e-5, relative to the largest value. Half precision may have 1.5 times
    (gradients: twice) the error of the same computation done eagerly in that dtype, or of the exact result rounded to
    it where the eager computation is exact by luck. Infinities must agree.
    """

    def distance(x: Tensor, y: Tensor) -> float:
        assert x.shape == y.shape and x.device == y.device
        same = x.double() == y
        worst = (x.double() - y).masked_fill(same, 0).abs().max().item() if x.numel() else 0.0
        return worst if worst == worst else float("inf")

    result = {}
    for name, truth in exact.items():
        if dtype.itemsize >= 4:
            largest = truth.nan_to_num(0, 0, 0).abs().max().item() if truth.numel() else 0.0
            allowed = max(largest, 1.0) * (1e-11 if dtype == torch.float64 else 1e-5)
        else:
            assert eager is not None
            yardstick = max(distance(eager[name], truth), distance(truth.to(got[name].dtype), truth))
            allowed = yardstick * (1.5 if name in ("out", "lse") else 2.0) + 1e-6
        result[name] = distance(got[name], truth), allowed
    return result


def measure(
    matrix: Any, case: Any, dtype: torch.dtype, impl: str, device: str | torch.device = "cpu", **operator: Callable
) -> dict[str, tuple[float, float]]:
    """`errors` of an implementation on a case.

    Args:
        matrix: module with `make_inputs`, `run` and `run_eager` of the operator.
        operator: `operator=`, a function like the public one, such as that compiled.
    """
    inputs = matrix.make_inputs(case, dtype, device)
    got = matrix.run(case, inputs, impl, **operator)
    exact = matrix.run(case, as_leaves(inputs, torch.float64), "reference")
    return errors(got, exact, matrix.run_eager(case, inputs) if dtype.itemsize < 4 else None, dtype)


def hold(matrix: Any, case: Any, dtype: torch.dtype, impl: str, **kwargs: Any) -> None:
    """Assert that an implementation keeps the error rule on a case, naming the case and everything that breaks it."""
    assert_exact(measure(matrix, case, dtype, impl, **kwargs), f"{impl} in {dtype} on {case!r}")


def assert_exact(found: dict[str, tuple[float, float]], what: str) -> None:
    """Assert that the error rule is kept, naming everything that breaks it."""
    broken = {name: f"{error:.3g} > {allowed:.3g}" for name, (error, allowed) in found.items() if not error <= allowed}
    assert not broken, f"{what}: {broken}"


def opcheck(operator: Operator, impl: str, tensors: Sequence[Tensor], call: Any, tolerance: float) -> None:
    """torch's own checks of the dispatcher's operator of an implementation and, without gradients, of its backward.

    The backward makes all gradients of the differentiable fields of `call`, then none. `tensors` are query, key, value.
    """
    arguments, forward = operator.codec.flatten(call), operator.dispatched[impl]
    torch.library.opcheck(forward, (*tensors, *arguments), atol=tolerance, rtol=tolerance)
    if any(x.requires_grad for x in tensors):
        return
    outputs = forward(*tensors, *arguments)
    gradients = [torch.randn_like(x) for x, flow in zip(outputs, operator.flows, strict=True) if flow]
    given = [arguments[place] is not None for place in operator.places]
    for wanted in (given, [False] * len(given)) if any(given) else (given,):
        torch.library.opcheck(
            getattr(torch.ops.foveal, forward.__name__.replace("_forward", "_backward")),
            (*tensors, *outputs, *gradients, *arguments, wanted),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
