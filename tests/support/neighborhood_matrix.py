"""The test matrix of neighborhood attention: random cases, their inputs, and the rule for how exact a result must be.

    for case in cases(rank=2, n=300, seed=0):
        check(case, torch.float64, "torch")

A case prints as the call that makes it again, so a failure can be pasted into a shell.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import prod
from random import Random

import operator_matrix
import torch
from foveal.kernels.neighborhood import geometry
from foveal.kernels.neighborhood.api import dispatch
from foveal.kernels.neighborhood.call import NeighborhoodCall
from foveal.kernels.ops import na1d, na2d, na3d
from operator_matrix import LAYOUTS, Inputs, as_leaves, gradients, lay_out, seeded_randn
from torch import Tensor

OPERATORS = {1: partial(na1d, return_lse=True), 2: partial(na2d, return_lse=True), 3: partial(na3d, return_lse=True)}
LENGTHS = {
    1: (1, 2, 3, 5, 8, 13, 16, 24, 31, 37, 48, 64, 97, 150),
    2: (1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 19, 23),
    3: (1, 2, 3, 4, 5, 6, 7, 8, 9, 11),
}
MAX_TOKENS = 420
HEAD_DIMS = (1, 2, 3, 4, 5, 8, 12, 16, 17, 24, 32, 40)
TENSORS = ("query", "key", "value", "bias", "additional_keys", "additional_values")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    batch: int = 1
    heads: int = 2
    key_heads: int = 2
    head_dim: int = 8
    bias: bool = False
    scale: float | None = None
    extra: int = 0
    layout: str = "contiguous"
    seed: int = 0
    value_dim: int | None = None
    additional_mask: str = ""  # "mask", "lengths" or none

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def axes(self) -> tuple[geometry.Axis, ...]:
        return tuple(map(geometry.Axis, self.shape, self.window, self.stride, self.dilation, self.causal))

    @property
    def visible(self) -> Tensor | None:
        """Which extra keys are visible, bool `[batch, extra]`; None for all."""
        if not self.additional_mask:
            return None
        generator = torch.Generator().manual_seed(self.seed + 2)
        if self.additional_mask == "mask":
            return torch.rand(self.batch, self.extra, generator=generator) < 0.5
        lengths = torch.randint(0, self.extra + 1, (self.batch,), generator=generator)
        return torch.arange(self.extra) < lengths[:, None]

    @property
    def options(self) -> dict:
        """Keyword arguments of the operator other than `impl` and tensors that have gradients."""
        names = ("window", "stride", "dilation", "causal", "scale")
        options = {name: getattr(self, name) for name in names}
        if (visible := self.visible) is not None:
            options["additional_mask"] = visible.sum(1) if self.additional_mask == "lengths" else visible
        return options


def _axis(random: Random, length: int, odd: bool) -> tuple[int, int, int, bool]:
    """Window, stride, dilation and causality for an axis, every legal value possible, corner values likely."""
    window = random.choice((length, random.randint(1, length), random.randint(1, min(length, 7))))
    window -= odd and window % 2 == 0
    most = length // window
    dilation = random.choice((1, 1, most, random.randint(1, most)))
    stride = random.choice((1, 1, window, random.randint(1, window)))
    return window, stride, dilation, random.random() < 0.25


def _case(random: Random, rank: int) -> Case:
    shape = tuple(random.choice(LENGTHS[rank]) for _ in range(rank))
    while prod(shape) > MAX_TOKENS:
        shape = tuple(random.choice(LENGTHS[rank]) for _ in range(rank))
    bias = random.random() < 0.35
    window, stride, dilation, causal = zip(*(_axis(random, length, bias) for length in shape), strict=True)
    heads = random.choice((1, 2, 3, 4))
    case = Case(
        shape=shape,
        window=window,
        stride=stride,
        dilation=dilation,
        causal=causal,
        batch=random.choice((0, 1, 1, 1, 1, 1, 2, 2, 2, 3)),
        heads=heads,
        key_heads=random.choice([h for h in range(1, heads + 1) if heads % h == 0]),
        head_dim=random.choice(HEAD_DIMS),
        bias=bias,
        scale=random.choice((None, None, None, 0.2, 1.0, 0.0)),
        extra=random.choice((0, 0, 0, 1, 2, 5, 17)),
        layout=random.choice(LAYOUTS),
        seed=random.randrange(2**31),
    )
    value_dim = random.choice((None, None, random.choice(HEAD_DIMS)))
    additional_mask = random.choice(("", "mask", "lengths")) if case.extra else ""
    return replace(case, value_dim=value_dim, additional_mask=additional_mask)


def cases(rank: int, n: int, seed: int) -> Iterator[Case]:
    """`n` random cases of one rank; the i-th depends on (rank, seed, i) only."""
    for i in range(n):
        yield _case(Random(f"{rank}/{seed}/{i}"), rank)


def masked_cases(rank: int, n: int, seed: int) -> Iterator[Case]:
    """Of random cases, the first `n` in which some extra keys are visible and some are not."""

    def is_masked(case: Case) -> bool:
        return case.visible is not None and bool(case.visible.any()) and not case.visible.all()

    return islice(filter(is_masked, cases(rank, 10**6, seed)), n)


def plain(case: Case, head_dim: int) -> Case:
    """The case without bias and extra keys, with heads of `head_dim` features in a layout that descriptors address."""
    layout = ("contiguous", "fused", "heads_first")[case.seed % 3]
    return replace(case, bias=False, extra=0, additional_mask="", value_dim=None, head_dim=head_dim, layout=layout)


def for_gluon(case: Case) -> Case:
    """The case as `impl="gluon"` takes it."""
    return plain(case, 64 << case.seed % 2)


def make_inputs(case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> Inputs:
    """Tensor arguments by name, None where the case has none: leaves that require gradients, values set by the seed."""
    randn = seeded_randn(case.seed, dtype, device)
    counts = (case.heads, case.key_heads, case.key_heads)
    grids = lay_out(case.layout, randn, case.batch, case.shape, counts, case.head_dim)
    value_dim = case.value_dim or case.head_dim
    if value_dim != case.head_dim:
        grids = (*grids[:2], lay_out(case.layout, randn, case.batch, case.shape, counts, value_dim)[2])
    tensors: Inputs = dict(zip(TENSORS, (*grids, None, None, None), strict=True))
    if case.bias:
        tensors["bias"] = randn(case.heads, *(2 * w - 1 for w in case.window))
    if case.extra:
        for name, width in (("additional_keys", case.head_dim), ("additional_values", value_dim)):
            tensors[name] = randn(case.batch, case.extra, case.key_heads, width)
    return as_leaves(tensors)


def on_device(case: Case, inputs: Inputs) -> dict:
    """The options of a case where its inputs are."""
    device = next(x.device for x in inputs.values() if x is not None)
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.options.items()}


def run(case: Case, inputs: Inputs, impl: str, operator: Callable | None = None) -> dict[str, Tensor]:
    """Forward and backward of the public operator (or of `operator`, e.g. compiled): out, lse and every gradient."""
    operator = OPERATORS[case.rank] if operator is None else operator
    out, lse = operator(**inputs, **on_device(case, inputs), impl=impl)
    return gradients(inputs, out, lse, case.seed + 1)


def run_eager(case: Case, inputs: Inputs, *, with_lse: bool = True) -> dict[str, Tensor]:
    """Forward and backward of masked attention in which every step rounds to the dtype of the inputs."""
    dtype = inputs["query"].dtype

    def flat(x: Tensor) -> Tensor:  # [B, heads, T, d]
        return x.flatten(1, -3).transpose(1, 2).repeat_interleave(case.heads // x.shape[-2], dim=1)

    q, k, v = (flat(inputs[name]) for name in ("query", "key", "value"))
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    logits = q @ k.transpose(-1, -2) * scale
    if inputs["bias"] is not None:
        logits = logits + inputs["bias"].to(dtype).flatten(1)[:, geometry.relative_index(case.axes, q.device)]
    logits = logits.masked_fill(~geometry.mask(case.axes, q.device), float("-inf"))
    if inputs["additional_keys"] is not None:
        extra = q @ flat(inputs["additional_keys"]).transpose(-1, -2) * scale
        if case.visible is not None:
            extra = extra.masked_fill(~case.visible[:, None, None].to(q.device), float("-inf"))
        logits = torch.cat([logits, extra], dim=-1)
        v = torch.cat([v, flat(inputs["additional_values"])], dim=2)
    out = (logits.softmax(-1) @ v).transpose(1, 2).unflatten(1, case.shape)
    lse = logits.to(torch.promote_types(dtype, torch.float32)).logsumexp(-1).transpose(1, 2).unflatten(1, case.shape)
    return gradients(inputs, out, lse if with_lse else None, case.seed + 1)


def errors(
    case: Case,
    dtype: torch.dtype,
    impl: str,
    device: str | torch.device = "cpu",
    operator: Callable | None = None,
    inputs: Inputs | None = None,
) -> dict[str, tuple[float, float]]:
    """Errors of `impl` and those allowed, by `operator_matrix.errors`."""
    inputs = make_inputs(case, dtype, device) if inputs is None else inputs
    got = run(case, inputs, impl, operator)
    exact = run(case, as_leaves(inputs, torch.float64), "reference")
    return operator_matrix.errors(got, exact, run_eager(case, inputs) if dtype.itemsize < 4 else None, dtype)


def check(case: Case, dtype: torch.dtype, impl: str, **kwargs) -> None:
    """Assert that `impl` keeps the error rule on this case, naming the case and everything that breaks it."""
    operator_matrix.assert_exact(errors(case, dtype, impl, **kwargs), f"{impl} in {dtype} on {case!r}")


def check_without_lse(case: Case, dtype: torch.dtype, impl: str) -> None:
    """Assert that the operator without a log-sum-exp keeps the error rule on this case."""
    operator = {1: na1d, 2: na2d, 3: na3d}[case.rank]

    def run(inputs: Inputs, impl: str) -> dict[str, Tensor]:
        return gradients(inputs, operator(**inputs, **on_device(case, inputs), impl=impl), None, case.seed + 1)

    inputs = make_inputs(case, dtype)
    got, exact = run(inputs, impl), run(as_leaves(inputs, torch.float64), "reference")
    eager = run_eager(case, inputs, with_lse=False) if dtype.itemsize < 4 else None
    operator_matrix.assert_exact(operator_matrix.errors(got, exact, eager, dtype), f"{impl} in {dtype} on {case!r}")


def check_part(case: Case, dtype: torch.dtype, impl: str) -> None:
    """Assert that queries which are a random box of the case's grid get what they get among all queries, on every other
    case from keys cropped to what the box needs."""
    random = Random(f"part/{case.seed}")
    boxes = [sorted(random.sample(range(length + 1), 2)) for length in case.shape]
    box = (slice(None), *(slice(*queries) for queries in boxes))
    axes = tuple(a._replace(queries=tuple(queries)) for a, queries in zip(case.axes, boxes, strict=True))
    needed = (slice(None), *(slice(a.length) for a in axes))
    if random.random() < 0.5:
        starts, axes = zip(*map(geometry.crop, axes), strict=True)
        needed = (slice(None), *(slice(i, i + a.length) for i, a in zip(starts, axes, strict=True)))
    inputs = make_inputs(case, dtype)

    def attend(axes, impl, inputs, box, needed):
        boxed = {"query": inputs["query"][box], "key": inputs["key"][needed], "value": inputs["value"][needed]}
        return dispatch(**inputs | boxed, axes=axes, scale=case.scale, additional_mask=case.visible, impl=impl)

    got = gradients(inputs, *attend(axes, impl, inputs, box, needed), seed=case.seed + 1)
    exact = as_leaves(inputs, torch.float64)
    out, lse = attend(case.axes, "reference", exact, ..., ...)
    found = operator_matrix.errors(got, gradients(exact, out[box], lse[box], seed=case.seed + 1), None, dtype)
    operator_matrix.assert_exact(found, f"{impl} in {dtype} on the box {boxes} of {case!r}")


def check_heads(case: Case, dtype: torch.dtype, impl: str) -> None:
    """Assert that heads of several windows, drawn for the case, get what each gets alone."""
    random, inputs = Random(f"heads/{case.seed}"), make_inputs(case, dtype)
    drawn = [[_axis(random, length, case.bias) for length in case.shape] for _ in range(random.randint(1, 3))]
    heads = [random.choice(drawn) for _ in range(case.heads)]  # head, axis, argument
    names = ("window", "stride", "dilation", "causal")
    options = {name: [[axis[i] for axis in head] for head in heads] for i, name in enumerate(names)}
    largest = [max(axis[0] for axis in of_axis) for of_axis in zip(*heads, strict=True)]
    if case.bias:
        randn = seeded_randn(case.seed + 3, dtype, "cpu")
        inputs["bias"] = randn(case.heads, *(2 * w - 1 for w in largest)).requires_grad_()
    given = {name: x for name, x in case.options.items() if name not in names}

    def alone(inputs: Inputs) -> tuple[Tensor, ...]:
        parts = []
        for head, sizes in enumerate(options["window"]):
            keys = slice(head // (case.heads // case.key_heads), head // (case.heads // case.key_heads) + 1)
            mine = {name: x if x is None else x[..., keys, :] for name, x in inputs.items()}
            mine["query"] = inputs["query"][..., head : head + 1, :]
            if (bias := inputs["bias"]) is not None:
                middle = (slice(w - n, w + n - 1) for w, n in zip(largest, sizes, strict=True))
                mine["bias"] = bias[(slice(head, head + 1), *middle)]
            one = {name: values[head] for name, values in options.items()}
            parts.append(OPERATORS[case.rank](**mine, **one, **given, impl="reference"))
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, -2), torch.cat(lses, -1)

    got = gradients(inputs, *OPERATORS[case.rank](**inputs, **options, **given, impl=impl), case.seed + 1)
    exact = as_leaves(inputs, torch.float64)
    found = operator_matrix.errors(got, gradients(exact, *alone(exact), case.seed + 1), None, dtype)
    operator_matrix.assert_exact(found, f"{impl} in {dtype} on heads of {options} and {case!r}")


def check_masked_tokens(case: Case, dtype: torch.dtype, impl: str) -> None:
    """Assert that extra keys and values which are masked go nowhere, NaN included, and have no gradient."""
    inputs, visible = make_inputs(case, dtype), case.visible
    assert visible is not None and not visible.all()
    poisoned = dict(inputs)
    for name in ("additional_keys", "additional_values"):
        poisoned[name] = inputs[name].detach().masked_fill(~visible[..., None, None], float("nan")).requires_grad_()
    clean, found = run(case, inputs, impl), run(case, poisoned, impl)
    for name, expected in clean.items():
        assert torch.equal(found[name], expected), name
    for name in ("additional_keys", "additional_values"):
        assert (clean[name][~visible] == 0).all()
    assert (clean["additional_values"][visible] != 0).any()


def make_call(case: Case, inputs: Inputs) -> NeighborhoodCall:
    """The call of a case whose heads share their windows."""
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    return NeighborhoodCall(case.axes, scale, *(inputs[name] for name in TENSORS[3:]), case.visible)
