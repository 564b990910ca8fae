"""The test matrix of scan attention: random cases, their inputs, and the rule for how exact a result must be.

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
from foveal.kernels.ops import scan_attention
from foveal.kernels.scan import call
from foveal.kernels.scan.call import ScanCall
from operator_matrix import LAYOUTS, Inputs, as_leaves, gradients, lay_out, seeded_randn
from torch import Tensor
from torch.nn import functional as F

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 11, 16, 17, 31, 48, 70, 150)
MAX_TOKENS = 200
HEAD_DIMS = (1, 2, 3, 5, 8, 12, 16, 17, 24, 32)
STEPS = {"forward": 1, "backward": -1}


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    batch: int = 1
    heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    decay: str = "none"  # "none", "head" or "token"
    delta: bool = False
    state: bool = False
    direction: str = "forward"
    scale: float = 1.0
    layout: str = "contiguous"
    seed: int = 0

    @property
    def options(self) -> dict:
        """Keyword arguments of the operator other than its tensors and `impl`."""
        one_way = self.direction != "both"
        return {"scale": self.scale, "direction": self.direction, "return_state": one_way}


def _shape(random: Random) -> tuple[int, ...]:
    """A grid of one to four axes."""
    while True:
        shape = tuple(random.choice(LENGTHS) for _ in range(random.choice((1, 1, 2, 2, 3, 4))))
        if prod(shape) <= MAX_TOKENS:
            return shape


def _case(random: Random) -> Case:
    head_dim, direction = random.choice(HEAD_DIMS), random.choice(("forward", "forward", "backward", "both"))
    return Case(
        shape=_shape(random),
        batch=random.choice((0, 1, 1, 1, 1, 1, 2, 2, 3)),
        heads=random.choice((1, 2, 3)),
        head_dim=head_dim,
        value_dim=random.choice((head_dim, head_dim, random.choice(HEAD_DIMS))),
        decay=random.choice(("none", "head", "token", "token")),
        delta=random.random() < 0.5,
        state=direction != "both" and random.random() < 0.5,
        direction=direction,
        scale=random.choice((1.0, 0.3, -0.4)),
        layout=random.choice(LAYOUTS),
        seed=random.randrange(2**31),
    )


def cases(n: int, seed: int) -> Iterator[Case]:
    """`n` random cases; the i-th depends on (seed, i) only."""
    for i in range(n):
        yield _case(Random(f"{seed}/{i}"))


def make_inputs(case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> Inputs:
    """Tensor arguments by name: leaves that require gradients, values set by the seed."""
    randn = seeded_randn(case.seed, dtype, device)
    wide = seeded_randn(case.seed + 1, torch.promote_types(dtype, torch.float32), device)

    def tokens(head_dim: int) -> tuple[Tensor, ...]:
        return lay_out(case.layout, randn, case.batch, case.shape, (case.heads,) * 3, head_dim)

    query, key, value = tokens(case.head_dim)
    if case.value_dim != case.head_dim:
        *_, value = tokens(case.value_dim)
    tensors: Inputs = {"query": query, "key": key, "value": value}
    if case.delta:  # stable for keys that are not too long
        strides = key.stride()
        unit = F.normalize(key.double(), dim=-1).to(dtype)
        tensors["key"] = torch.empty_strided(key.shape, strides, dtype=dtype, device=device)
        tensors["key"] = unit if 0 in strides else tensors["key"].copy_(unit)
    gates = (case.batch, *case.shape, case.heads)
    if case.decay != "none":
        tensors["log_decay"] = -wide(*(gates if case.decay == "token" else gates[-1:])).abs()
    if case.delta:
        tensors["beta"] = wide(*gates).sigmoid()
    if case.state:
        tensors["state"] = wide(case.batch, case.heads, case.head_dim, case.value_dim)
    return as_leaves(tensors)


def make_call(case: Case, inputs: Inputs) -> ScanCall:
    """The call of a case."""
    return call.make_call(**inputs, **case.options)


def run(case: Case, inputs: Inputs, impl: str, operator: Callable = scan_attention) -> dict[str, Tensor]:
    """Forward and backward of the operator (or of one like it, e.g. compiled): out, state and every gradient."""
    found = operator(**inputs, **case.options, impl=impl)
    out, state = (found, None) if isinstance(found, Tensor) else found
    return gradients(inputs, out, state, case.seed + 1)


def run_eager(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Forward and backward of the recurrence in which every step rounds to the dtype of the inputs, but for states."""
    q, k, v = (inputs[name].flatten(1, -3) for name in ("query", "key", "value"))
    order = range(q.shape[1])
    outs, last = [], None
    for direction in ("forward", "backward") if case.direction == "both" else (case.direction,):
        state = inputs.get("state")
        state = q.new_zeros(*q.shape[:1], *q.shape[-2:], v.shape[-1]) if state is None else state.to(q.dtype)
        reads: list[Tensor] = []
        for t in order[:: STEPS[direction]]:
            if case.decay != "none":
                decay = inputs["log_decay"].exp().to(q.dtype)
                decay = decay if case.decay == "head" else decay.flatten(1, -2)[:, t]
                state = state * decay[..., None, None]
            before, new = state, v[:, t]
            if case.delta:
                beta = inputs["beta"].flatten(1, -2)[:, t, :, None].to(q.dtype)
                new = beta * (new - (state * k[:, t, :, :, None]).sum(-2))
            state = state + k[:, t, :, :, None] * new[..., None, :]
            strict = case.direction == "both" and direction == "backward" and not case.delta
            reads.append(case.scale * ((before if strict else state) * q[:, t, :, :, None]).sum(-2))
        outs.append(torch.stack(reads[:: STEPS[direction]], 1))
        last = state
    out = sum(outs[1:], outs[0]).reshape(*inputs["query"].shape[:-1], case.value_dim)
    return gradients(inputs, out, None if case.direction == "both" else last, case.seed + 1)


errors = partial(operator_matrix.measure, sys.modules[__name__])
check = partial(operator_matrix.hold, sys.modules[__name__])
