"""The test matrix of linear attention: random cases, their inputs, and the rule for how exact a result must be.

    for case in cases(n=300, seed=0):
        check(case, torch.float64, "torch")

A case prints as the call that makes it again, so a failure can be pasted into a shell.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from random import Random

import operator_matrix
import torch
from foveal.kernels.linear import call
from foveal.kernels.linear.call import LinearCall
from foveal.kernels.ops import linear_attention
from operator_matrix import LAYOUTS, Inputs, as_leaves, gradients, lay_out, seeded_randn
from torch import Tensor

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 31, 33, 48, 70, 150)
MAX_TOKENS = 320
HEAD_DIMS = (1, 2, 3, 5, 8, 12, 16, 17, 24, 32, 40, 48)
VARIANTS = (
    {},
    {"mean": True},
    {"relu": True, "floor": 20.0},  # some normalisers are below, some above
    {"relu": True, "floor": 0.5, "mean": True},
    {"eps": 0.1},
    {"eps": 1e-2, "mean": True},
    {"eps": 0.0},
    {"relu": True, "eps": 1.0},
    {"centered": True},
    {"centered": True, "relu": True},
)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    batch: int = 1
    heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    relu: bool = False
    mean: bool = False
    centered: bool = False
    eps: float | None = None
    floor: float | None = None
    scale: float | None = 1.0  # None: a tensor
    layout: str = "contiguous"
    seed: int = 0

    @property
    def options(self) -> dict:
        """Keyword arguments of the operator other than its tensors and `impl`."""
        names = ("relu", "mean", "centered", "eps", "floor")
        scale = {} if self.scale is None else {"scale": self.scale}
        return {name: getattr(self, name) for name in names} | scale


def _shape(random: Random) -> tuple[int, ...]:
    """A grid of one to four axes."""
    while True:
        shape = tuple(random.choice(LENGTHS) for _ in range(random.choice((1, 2, 2, 2, 3, 4))))
        if prod(shape) <= MAX_TOKENS:
            return shape


def _case(random: Random) -> Case:
    shape, head_dim = _shape(random), random.choice(HEAD_DIMS)
    variant, layout = random.choice(VARIANTS), random.choice(LAYOUTS)
    if "centered" in variant and layout == "expanded":  # values that are all equal have the covariance of rounding
        layout = "contiguous"
    return Case(
        shape=shape,
        key_shape=random.choice((shape, _shape(random))),
        batch=random.choice((0, 1, 1, 1, 1, 1, 2, 2, 2, 3)),
        heads=random.choice((1, 2, 3)),
        head_dim=head_dim,
        value_dim=random.choice((head_dim, head_dim, random.choice(HEAD_DIMS))),
        **variant,
        scale=random.choice((1.0, None, 0.3, -0.4)),
        layout=layout,
        seed=random.randrange(2**31),
    )


def cases(n: int, seed: int) -> Iterator[Case]:
    """`n` random cases; the i-th depends on (seed, i) only."""
    for i in range(n):
        yield _case(Random(f"{seed}/{i}"))


def make_inputs(case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> Inputs:
    """Tensor arguments by name: leaves that require gradients, values set by the seed."""
    randn = seeded_randn(case.seed, dtype, device)

    def features(*size: int) -> Tensor:  # a normaliser must stay away from zero: all features positive, unless ReLU'd
        x = randn(*size)
        return x.abs() + 0.1 if case.eps is not None and not case.relu else x

    def tokens(shape: tuple[int, ...], head_dim: int, draw: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return lay_out(case.layout, draw, case.batch, shape, (case.heads,) * 3, head_dim)

    query, key, value = tokens(case.shape, case.head_dim, features)
    if case.key_shape != case.shape:
        _, key, value = tokens(case.key_shape, case.head_dim, features)
    if case.value_dim != case.head_dim:
        *_, value = tokens(case.key_shape, case.value_dim, randn)
    tensors: Inputs = {"query": query, "key": key, "value": value}
    if case.scale is None:
        tensors["scale"] = randn(case.heads)
    return as_leaves(tensors)


def make_call(case: Case, inputs: Inputs) -> LinearCall:
    """The call of a case."""
    return call.make_call(**inputs, **case.options)


def run(case: Case, inputs: Inputs, impl: str, operator: Callable = linear_attention) -> dict[str, Tensor]:
    """Forward and backward of the operator (or of one like it, e.g. compiled): out and every gradient."""
    return gradients(inputs, operator(**inputs, **case.options, impl=impl), None, case.seed + 1)


def run_eager(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Forward and backward of the two products written out, in which every step rounds to the dtype of the inputs."""
    q, k, v = (inputs[name].flatten(1, -3).transpose(1, 2) for name in ("query", "key", "value"))
    if case.relu:
        q, k = q.relu(), k.relu()
    scale = inputs["scale"][:, None, None] if case.scale is None else case.scale
    share = 1 / k.shape[2] if case.mean or case.centered else 1.0
    if case.centered:
        middle = v.mean(2, keepdim=True)
        out = middle + q @ ((k - k.mean(2, keepdim=True)).transpose(-1, -2) @ (v - middle) * share * scale)
    else:
        out = q @ (k.transpose(-1, -2) @ v * share * scale)
    if case.eps is not None or case.floor is not None:
        normaliser = (q * (k.sum(2, keepdim=True) * share)).sum(-1, keepdim=True)
        out = out / (normaliser + case.eps if case.floor is None else normaliser.clamp(min=case.floor))
    out = out.transpose(1, 2).reshape(*inputs["query"].shape[:-1], case.value_dim)
    return gradients(inputs, out, None, case.seed + 1)


errors = partial(operator_matrix.measure, sys.modules[__name__])
check = partial(operator_matrix.hold, sys.modules[__name__])


def _moved(case: Case, moved: slice) -> Inputs:
    """Inputs with a hundred added to some keys and values."""
    inputs = {name: x.detach().clone() for name, x in make_inputs(case, torch.float32).items()}
    for name in ("key", "value"):
        inputs[name][:, moved] += 100
    return as_leaves(inputs)


def check_large_means(impl: str) -> None:
    """Assert that centred attention and its gradients are exact where means are a hundred times the spreads."""
    case = Case((20,), (33,), centered=True)
    inputs = _moved(case, slice(None))
    got, exact = run(case, inputs, impl), run(case, as_leaves(inputs, torch.float64), "reference")
    for name, truth in exact.items():
        coarse = 2e-5 if name == "out" else 0.0  # the output holds the mean: float32 near 100
        torch.testing.assert_close(got[name].double(), truth, rtol=0, atol=1e-5 * truth.std().item() + coarse)


def check_first_token_far_away(impl: str) -> None:
    """Assert that centred attention and its gradients are exact where the first token is far from all others."""
    case = Case((20,), (2000,), centered=True)
    inputs = _moved(case, slice(1))
    got, exact = run(case, inputs, impl), run(case, as_leaves(inputs, torch.float64), "reference")
    for name, truth in exact.items():
        torch.testing.assert_close(got[name].double(), truth, rtol=0, atol=3e-6 * truth.abs().max().item())
