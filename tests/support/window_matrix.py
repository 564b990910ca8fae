"""The test matrix of window attention: random cases, their inputs, and the rule for how exact a result must be."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from random import Random

import operator_matrix
import torch
from foveal.kernels.ops import window_attention
from foveal.kernels.window import Axis, call, geometry
from foveal.kernels.window.call import WindowCall
from operator_matrix import LAYOUTS, Inputs, as_leaves, gradients, lay_out, seeded_randn
from torch import Tensor

LENGTHS = {1: (1, 2, 5, 8, 13, 16, 31, 48, 97), 2: (1, 2, 3, 5, 7, 8, 11, 14, 16), 3: (1, 2, 3, 4, 5, 7)}
MAX_TOKENS = 300
HEAD_DIMS = (1, 3, 4, 8, 16, 17, 32, 40)
TENSORS = ("query", "key", "value", "bias")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    halo: tuple[int, ...]
    padded: bool = False
    batch: int = 1
    heads: int = 2
    key_heads: int = 2
    head_dim: int = 8
    value_dim: int | None = None  # that of keys
    bias: bool = False
    scale: float | None = None
    layout: str = "contiguous"
    seed: int = 0

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def axes(self) -> tuple[Axis, ...]:
        values = zip(self.shape, self.window, self.shift, self.halo, strict=True)
        return tuple(Axis(*axis, self.padded) for axis in values)

    @property
    def options(self) -> dict:
        """Keyword arguments of the operator other than its tensors and `impl`."""
        return {name: getattr(self, name) for name in ("window", "shift", "halo", "scale")}


def _case(random: Random, rank: int) -> Case:
    shape = tuple(random.choice(LENGTHS[rank]) for _ in range(rank))
    while prod(shape) > MAX_TOKENS:
        shape = tuple(random.choice(LENGTHS[rank]) for _ in range(rank))
    window = tuple(random.choice((n, random.randint(1, n), random.randint(1, min(n, 4)))) for n in shape)
    kind = random.choice(("plain", "shift", "shift", "halo", "padded"))
    halo = tuple(random.randint(0, 3) if kind in ("halo", "padded") else 0 for _ in shape)
    heads = random.choice((1, 2, 4))
    return Case(
        shape=shape,
        window=window,
        shift=tuple(random.randrange(w) if kind == "shift" else 0 for w in window),
        halo=halo,
        padded=kind == "padded" and any(halo),
        batch=random.choice((0, 1, 1, 1, 2, 3)),
        heads=heads,
        key_heads=random.choice([h for h in (1, 2, 4) if heads % h == 0]),
        head_dim=random.choice(HEAD_DIMS),
        bias=random.random() < 0.5,
        scale=random.choice((None, None, 0.2, 0.0, -0.5)),
        layout=random.choice(LAYOUTS),
        seed=random.randrange(2**31),
        value_dim=random.choice((None, None, None, random.choice(HEAD_DIMS))),
    )


def cases(rank: int, n: int, seed: int) -> Iterator[Case]:
    """`n` random cases of one rank; the i-th depends on (rank, seed, i) only."""
    for i in range(n):
        yield _case(Random(f"window/{rank}/{seed}/{i}"), rank)


def make_inputs(case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> Inputs:
    """Tensor arguments by name, None where the case has none: leaves that require gradients, values set by the seed."""
    randn = seeded_randn(case.seed, dtype, device)
    counts = (case.heads, case.key_heads, case.key_heads)
    query, key, value = lay_out(case.layout, randn, case.batch, case.shape, counts, case.head_dim)
    if case.padded:
        enlarged = tuple(n + 2 * h for n, h in zip(case.shape, case.halo, strict=True))
        _, key, value = lay_out(case.layout, randn, case.batch, enlarged, counts, case.head_dim)
    if case.value_dim:
        *_, value = lay_out(case.layout, randn, case.batch, key.shape[1:-2], counts, case.value_dim)
    tensors: Inputs = {"query": query, "key": key, "value": value, "bias": None}
    if case.bias:
        tensors["bias"] = randn(case.heads, prod(case.window), prod(a.span for a in case.axes))
    return as_leaves(tensors)


def make_call(case: Case, inputs: Inputs) -> WindowCall:
    """The call of a case."""
    return call.make_call(**inputs, **case.options)


def run(case: Case, inputs: Inputs, impl: str, operator: Callable | None = None) -> dict[str, Tensor]:
    """Forward and backward of the public operator (or of `operator`, e.g. compiled): out, lse and every gradient."""
    operator = partial(window_attention, return_lse=True) if operator is None else operator
    out, lse = operator(**inputs, **case.options, impl=impl)
    return gradients(inputs, out, lse, case.seed + 1)


def run_eager(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Forward and backward of masked attention in which every step rounds to the dtype of the inputs."""
    dtype = inputs["query"].dtype

    def flat(x: Tensor) -> Tensor:  # [B, heads, T, d]
        return x.flatten(1, -3).transpose(1, 2).repeat_interleave(case.heads // x.shape[-2], dim=1)

    q, k, v = (flat(inputs[name]) for name in ("query", "key", "value"))
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    logits = q @ k.transpose(-1, -2) * scale
    if inputs["bias"] is not None:
        logits = logits + inputs["bias"].to(dtype).flatten(1)[:, geometry.bias_index(case.axes, q.device)]
    logits = logits.masked_fill(~geometry.mask(case.axes, q.device), float("-inf"))
    out = (logits.softmax(-1) @ v).transpose(1, 2).unflatten(1, case.shape)
    lse = logits.to(torch.promote_types(dtype, torch.float32)).logsumexp(-1).transpose(1, 2).unflatten(1, case.shape)
    return gradients(inputs, out, lse, case.seed + 1)


def check(
    case: Case, dtype: torch.dtype, impl: str, device: str | torch.device = "cpu", operator: Callable | None = None
) -> None:
    """Assert that `impl` keeps the error rule on this case, naming the case and everything that breaks it."""
    inputs = make_inputs(case, dtype, device)
    got = run(case, inputs, impl, operator)
    exact = run(case, as_leaves(inputs, torch.float64), "reference")
    eager = run_eager(case, inputs) if dtype.itemsize < 4 else None
    found = operator_matrix.errors(got, exact, eager, dtype)
    operator_matrix.assert_exact(found, f"{impl} in {dtype} on {case!r}")
