"""The test matrix of agent attention: random cases, their inputs, and the rule for how exact a result must be.

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
from foveal.kernels.agent import call
from foveal.kernels.agent.call import AgentCall
from foveal.kernels.ops import agent_attention
from operator_matrix import LAYOUTS, Inputs, as_leaves, gradients, lay_out, seeded_randn
from torch import Tensor

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 31, 33, 48, 70, 150)
MAX_TOKENS = 320
HEAD_DIMS = (1, 2, 3, 5, 8, 12, 16, 17, 24, 32, 40)
TENSORS = ("query", "key", "value", "agent", "agent_bias", "query_bias")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    agents: int
    batch: int = 1
    heads: int = 2
    head_dim: int = 8
    value_dim: int | None = None  # that of keys
    agent_bias: bool = False
    query_bias: bool = False
    scale: float | None = None
    query_scale: float | None = None
    layout: str = "contiguous"
    seed: int = 0

    @property
    def options(self) -> dict:
        """Keyword arguments of the operator other than its tensors and `impl`."""
        return dict(scale=self.scale, query_scale=self.query_scale)


def _shape(random: Random) -> tuple[int, ...]:
    """A grid of one to four axes."""
    while True:
        shape = tuple(random.choice(LENGTHS) for _ in range(random.choice((1, 2, 2, 2, 3, 4))))
        if prod(shape) <= MAX_TOKENS:
            return shape


def _case(random: Random) -> Case:
    shape = _shape(random)
    return Case(
        shape=shape,
        key_shape=random.choice((shape, _shape(random))),
        agents=random.choice((1, 2, 4, 9, 16, 17, 33, 49, 81)),
        batch=random.choice((0, 1, 1, 1, 1, 1, 2, 2, 2, 3)),
        heads=random.choice((1, 2, 3)),
        head_dim=random.choice(HEAD_DIMS),
        agent_bias=random.random() < 0.5,
        query_bias=random.random() < 0.5,
        scale=random.choice((None, None, 0.3, 1.0, 0.0, -0.4)),
        query_scale=random.choice((None, None, 0.3, 1.0, 0.0, -0.4)),
        layout=random.choice(LAYOUTS),
        seed=random.randrange(2**31),
        value_dim=random.choice((None, None, None, random.choice(HEAD_DIMS))),
    )


def cases(n: int, seed: int) -> Iterator[Case]:
    """`n` random cases; the i-th depends on (seed, i) only."""
    for i in range(n):
        yield _case(Random(f"{seed}/{i}"))


def make_inputs(case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> Inputs:
    """Tensor arguments by name, None where the case has none: leaves that require gradients, values set by the seed."""
    randn = seeded_randn(case.seed, dtype, device)

    def tokens(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        return lay_out(case.layout, randn, case.batch, shape, (case.heads,) * 3, case.head_dim)

    query, key, value = tokens(case.shape)
    if case.key_shape != case.shape:
        _, key, value = tokens(case.key_shape)
    agent, *_ = tokens((case.agents,))
    if case.value_dim:
        *_, value = lay_out(case.layout, randn, case.batch, case.key_shape, (case.heads,) * 3, case.value_dim)
    tensors: Inputs = dict(zip(TENSORS, (query, key, value, agent, None, None), strict=True))
    if case.agent_bias:
        tensors["agent_bias"] = randn(case.heads, case.agents, prod(case.key_shape))
    if case.query_bias:  # as a bilinear map of `[heads, agents, H, W]` gives it: agents first in memory
        tensors["query_bias"] = randn(case.heads, case.agents, prod(case.shape)).transpose(1, 2)
    return as_leaves(tensors)


def make_call(case: Case, inputs: Inputs) -> AgentCall:
    """The call of a case."""
    return call.make_call(**inputs, **case.options)


def run(case: Case, inputs: Inputs, impl: str, operator: Callable = agent_attention) -> dict[str, Tensor]:
    """Forward and backward of the operator (or of one like it, e.g. compiled): out and every gradient."""
    return gradients(inputs, operator(**inputs, **case.options, impl=impl), None, case.seed + 1)


def run_eager(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Forward and backward of two softmax attentions in which every step rounds to the dtype of the inputs."""
    names = ("query", "key", "value", "agent")
    q, k, v, a = (inputs[name].flatten(1, -3).transpose(1, 2) for name in names)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    query_scale = scale if case.query_scale is None else case.query_scale
    logits = a @ k.transpose(-1, -2) * scale
    if case.agent_bias:
        logits = logits + inputs["agent_bias"]
    agent_value = logits.softmax(-1) @ v
    logits = q @ a.transpose(-1, -2) * query_scale
    if case.query_bias:
        logits = logits + inputs["query_bias"]
    out = (logits.softmax(-1) @ agent_value).transpose(1, 2).reshape(*inputs["query"].shape[:-1], v.shape[-1])
    return gradients(inputs, out, None, case.seed + 1)


errors = partial(operator_matrix.measure, sys.modules[__name__])
check = partial(operator_matrix.hold, sys.modules[__name__])
