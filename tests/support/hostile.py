"""Memory and orders of programs that no device promises: what a kernel computes must not depend on them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from unittest.mock import patch

import torch
from torch import Tensor

ROUND = 4096  # numbers of NaN before and after a tensor


def embed(x: Tensor | None) -> Tensor | None:
    """The same values and strides in the midst of NaN."""
    if x is None:
        return None
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    storage = torch.full((size + 2 * ROUND,), float("nan"), dtype=x.dtype, device=x.device)
    inside = storage.as_strided(x.shape, x.stride(), ROUND)
    once = [slice(None) if s else slice(0, 1) for s in x.stride()]  # an expanded axis is one token in memory
    inside[tuple(once)].copy_(x.detach()[tuple(once)])
    return inside.requires_grad_(x.requires_grad)


@contextmanager
def nan_in_empty(fill: bool = True) -> Iterator[None]:
    """Inside the block `torch.empty` holds NaN, and PyTorch is deterministic; without `fill` no NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what `torch.empty` makes
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Inside the block Triton's interpreter runs the programs of a launch in a random order."""
    from triton.runtime import interpreter

    random, builder = Random(seed), interpreter.interpreter_builder
    order: list[int] = []

    def set_grid_dim(x, y, z):
        order[:] = random.sample(range(x), x)
        type(builder).set_grid_dim(builder, x, y, z)

    def set_grid_idx(x, y, z):
        type(builder).set_grid_idx(builder, order[x], y, z)

    with ExitStack() as stack:
        for name, function in (("set_grid_dim", set_grid_dim), ("set_grid_idx", set_grid_idx)):
            stack.enter_context(patch.object(builder, name, function, create=True))
        yield


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], what: object) -> None:
    """Equal bits; NaN at the same places."""
    for name, x in expected.items():
        y = got[name]
        assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num()), (name, what)
