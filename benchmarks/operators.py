"""Benchmarks of attention operators, which are checked against the float64 reference before they are timed.

The error rule is that of the tests: half precision may have 1.5 times (gradients: twice) the error of the same eager
computation in that dtype, float32 a relative error of 1e-5.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from foveal.kernels.tools.explain import explain
from torch import Tensor

from tests.support.operator_matrix import as_leaves, errors, gradients

from . import figures
from .benchmark import Benchmark, Call, Maker, Metric, Work, dtype_name, refuse_wrong
from .peers import Attend, compiled
from .records import Row

Tensors = dict[str, Tensor]
MOST_REFERENCE_LOGITS = 1 << 25  # larger cases are checked on a crop


def randn(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Callable[..., Tensor]:
    """`torch.randn` of given sizes whose values follow from the seed; on the meta device there are none."""
    if device.type == "meta":
        return partial(torch.empty, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    return partial(torch.randn, generator=generator, device=device, dtype=dtype)


def bind(function: Attend, mode: str, tensors: Tensors, gradient: Tensor) -> Call:
    """A call without arguments that does the forward, or forward and backward."""
    if mode == "forward":
        return torch.no_grad()(partial(function, **tensors))
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}

    def both() -> tuple[Tensor, ...]:
        out = function(**leaves)
        # dense attention takes no bias
        grads = torch.autograd.grad(out, tuple(leaves.values()), gradient, allow_unused=True)
        return out.detach(), *(grad for grad in grads if grad is not None)

    return both


class Operator(Benchmark):
    """Base of operator benchmarks; a subclass names the operator, its inputs and its peers.

    Attributes:
        folder: folder under `kernels/` whose README holds the lower bounds.
    """

    suite = "kernels"
    folder: ClassVar[str]

    @abstractmethod
    def inputs(self, case: Any, device: torch.device) -> Tensors:
        """Tensor arguments by name, query first; all take part in the backward."""

    @abstractmethod
    def arguments(self, case: Any) -> dict:
        """Keyword arguments other than tensors and `impl`."""

    @abstractmethod
    def function(self, case: Any) -> Callable[..., Tensor]:
        """The public function."""

    @abstractmethod
    def eager(self, case: Any, device: torch.device) -> Attend:
        """Plain PyTorch for the same computation, each step in the dtype of the inputs."""

    def yardstick(self, case: Any, device: torch.device) -> Attend:
        """Eager computation whose error in half precision is the unit of the error rule."""
        return self.eager(case, device)

    @abstractmethod
    def peers(self, case: Any, mode: str, device: torch.device) -> dict[str, Callable[[], Attend]]:
        """Functions that make each peer, by name."""

    @abstractmethod
    def crop(self, case: Any) -> Any:
        """Similar case that is small enough for the reference."""

    def scaling(self, device: torch.device) -> Sequence[Any]:
        """Cases that differ in the number of tokens only."""
        return ()

    def ours(self, case: Any, impl: str = "auto") -> Attend:
        return partial(self.function(case), **self.arguments(case), impl=impl)

    def definition(self, case: Any, given: Tensors) -> Attend:
        """Function of float64 tensors that defines the right result on `given`."""
        return self.ours(case, impl="reference")

    def verify(self, case: Any, device: torch.device) -> None:
        small = self.crop(case)
        given: Any = as_leaves({**self.inputs(small, device)})
        exact: Any = as_leaves(given, torch.float64)
        found = gradients(given, self.ours(small)(**given), None, 1)
        truth = gradients(exact, self.definition(small, given)(**exact), None, 1)
        yardstick = None
        if case.dtype.itemsize < 4:
            yardstick = gradients(given, self.yardstick(small, device)(**given), None, 1)
        what = f"{case.kernel} {case.name} {dtype_name(case)}"
        refuse_wrong(what, errors(found, truth, yardstick, case.dtype))

    def same_result(self, provider: str) -> bool:
        return not provider.startswith("dense")

    def makers(self, case: Any, mode: str, device: torch.device, *, everything: bool = False) -> dict[str, Maker]:
        ours = {"foveal": partial(self.ours, case), "foveal compiled": lambda: compiled(self.ours(case))}
        return {
            name: partial(self._call, make, case, mode, device)
            for name, make in (ours | self.peers(case, mode, device)).items()
        }

    def _call(self, make: Callable[[], Attend], case: Any, mode: str, device: torch.device) -> Call:
        function = make()
        tensors = self.inputs(case, device)
        gradient = randn(device, case.dtype, seed=1)(tensors["query"].shape)
        return bind(function, mode, tensors, gradient)

    def work(self, case: Any, mode: str) -> Work:
        tensors = self.inputs(case, torch.device("meta"))
        summary = explain(self.function(case), **tensors, **self.arguments(case)).cost
        passes = ("forward",) if mode == "forward" else ("forward", "backward")
        return Work(*(sum(summary[f"{name}_{what}"] for name in passes) for what in ("flops", "bytes")))

    def derive(self, case: Any, mode: str, measured: Sequence[Metric], device: torch.device) -> Iterator[Metric]:
        """Memory relative to query, key, value and output."""
        tensors = self.inputs(case, torch.device("meta"))
        size = sum(tensors[name].nbytes for name in ("query", "key", "value")) + tensors["query"].nbytes
        for metric in measured:
            if metric.metric == "memory":
                yield Metric(metric.provider, "memory ratio", "x", metric.p50 * 2**20 / size)

    def plot(self, rows: Sequence[Row], path: Path) -> None:
        figures.bars(rows, path, title=self.title)
