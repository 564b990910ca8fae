"""Declare an attention operator once: its call, what is differentiable, where it is computed and what it costs.

From the declaration follow the operators of torch's dispatcher (`torch.ops.foveal.*`: schema, fake kernels, gradient,
FLOP formulas), the choice of implementation, the treatment of autocast, and what `explain`, the compile report and the
tests enumerate. Only torch is imported here, so a first call may be a compiled one; modules of kernels are imported
when they first run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .calling import MAX_TRITON_HEAD_DIM, Impl, is_compiled_on_cpu, triton_obstacle, without_autocast
from .schema import codec

Flops = Callable[..., tuple[int, int]]
Fake = Callable[..., tuple[Tensor, ...]]
OPERATORS: dict[str, Operator] = {}  # by name
FUNCTIONS: dict[str, Public] = {}  # by name


class Public(NamedTuple):
    """A public function of an operator: its call from arguments, and what `explain` says of a call."""

    operator: Operator
    make_call: Callable[..., Any]
    summarize: Callable[..., dict] | None


def output_and_lse(query: Tensor, key: Tensor, value: Tensor, call: Any) -> tuple[Tensor, Tensor]:
    """Empty output `[..., heads, value_dim]` and log-sum-exp `[..., heads]`, in float32 at least."""
    accumulate = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return out, query.new_empty(query.shape[:-1], dtype=accumulate)


class Operator:
    """An attention operator.

    Implementations are modules of the operator's package. One that runs as PyTorch operators offers
    `attend(query, key, value, call)`, which returns the outputs that have gradients, or the only one. One that is an
    operator of the dispatcher offers

        forward(query, key, value, call) -> outputs
        backward(query, key, value, outputs, gradients, call, wanted) -> gradients of query, key, value and each
            differentiable field of the call; None where the field is None. Where `wanted` says that nobody asks, a
            gradient may be None and is dropped.

    Args:
        name: of the operator: `torch.ops.foveal.{name}_forward`, `…_backward`, and the same after
            `{name}_{implementation}` for further implementations.
        package: full name of the package that holds the modules.
        call: frozen dataclass of everything but query, key and value, checked before the operator sees it.
        differentiable: fields of the call with gradients, `Tensor | None` each.
        flops: (forward, backward) from (query, key, value, call), useful products only.
        summarize: further quantities for `explain` from (query, key, value, call, impl).
        fake: empty outputs from (query, key, value, call).
        flows: per output, whether a gradient flows into it. Others are kept for the backward pass and not returned.
        modules: module of each implementation; without "triton" the dispatcher has no operator.
        graph: implementation without kernels that is one operator of a compiled graph on CPU.
        max_head_dims: largest head dims of query and of value that the Triton kernels take; None for any.
        unsupported: further reasons of `impl="triton"` from (query, key, value, call), or None.
        on_request: implementations with kernels that "auto" never takes, by name: why each cannot take (query, key,
            value, call), or None. Where no call is known yet, `call` is None.
        prepare: changes (query, key, value, call) before the dispatcher, such as a sign taken into the query.
        title: the attention, as an error calls it.
    """

    def __init__(
        self,
        name: str,
        *,
        package: str,
        call: type,
        flops: Flops,
        title: str,
        differentiable: Sequence[str] = (),
        summarize: Callable[..., dict] | None = None,
        fake: Fake = output_and_lse,
        flows: Sequence[bool] = (True, True),
        modules: dict[str, str] | None = None,
        graph: str | None = None,
        max_head_dims: tuple[int, int | None] = (MAX_TRITON_HEAD_DIM, MAX_TRITON_HEAD_DIM),
        unsupported: Callable[..., str | None] | None = None,
        on_request: dict[str, Callable[..., str | None]] | None = None,
        prepare: Callable[..., tuple] | None = None,
    ):
        self.name, self.package, self.call, self.title = name, package, call, title
        self.flops, self.summarize, self.fake, self.flows = flops, summarize, fake, tuple(flows)
        self.modules = modules or {"triton": "launch", "torch": "tiled", "reference": "reference"}
        self.max_head_dims, self.unsupported, self.prepare = max_head_dims, unsupported, prepare
        self.on_request = on_request or {}
        self.with_kernels = ("triton", *self.on_request)
        self._loaded: dict[str, Any] = {}  # modules by implementation
        self.codec = codec(call)
        self.arguments = ", ".join(f"{schema} {suffix[1:]}" for schema, suffix in self.codec.arguments)
        names = [suffix[1:] for _, suffix in self.codec.arguments]
        self.places = [names.index(field) for field in differentiable]
        self.dispatched: dict[str, Callable] = {}
        if "triton" in self.modules:
            self.dispatched["triton"] = self._define(name, "triton")
        for impl in (*self.on_request, *(() if graph is None else (graph,))):
            self.dispatched[impl] = self._define(f"{name}_{impl}", impl)
        OPERATORS[name] = self

    def module(self, impl: str):
        """The module of an implementation, imported when it is first asked for."""
        if impl not in self._loaded:
            self._loaded[impl] = import_module(f"{self.package}.{self.modules[impl]}")
        return self._loaded[impl]

    # choice of implementation

    def unsupported_reasons(self, query: Tensor, key: Tensor, value: Tensor, call: Any) -> dict[str, str | None]:
        """For each implementation, why it cannot take a call, or None."""
        return {impl: self._unsupported_reason(impl, query, key, value, call) for impl in self.modules}

    def _unsupported_reason(self, impl: str, query: Tensor, key: Tensor, value: Tensor, call: Any) -> str | None:
        if impl in self.on_request:
            return self.on_request[impl](query, key, value, call)
        if impl != "triton":
            return None
        reason = triton_obstacle(query, value, self.max_head_dims)
        return self.unsupported(query, key, value, call) if reason is None and self.unsupported is not None else reason

    def select_impl(self, query: Tensor, key: Tensor, value: Tensor, call: Any, impl: Impl = "auto") -> Impl:
        """Name of the implementation of a call; an explicit request is kept or refused, never replaced.

        Raises:
            ValueError: an unknown name.
            NotImplementedError: the implementation asked for cannot take the call; the message says why.
        """
        if impl == "auto" and (query.device.type != "cuda" or "triton" not in self.modules):
            return "torch"
        if impl != "auto" and impl not in self.modules:
            raise ValueError(f"impl={impl!r} must be one of {('auto', *self.modules)}")
        if impl in ("torch", "reference"):
            return impl
        wanted: Impl = "triton" if impl == "auto" else impl
        why = self._unsupported_reason(wanted, query, key, value, call)
        if why is not None and impl != "auto":
            raise NotImplementedError(f"impl={impl!r} cannot take this call: {why}")
        return wanted if why is None else "torch"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, call: Any, *, impl: Impl = "auto") -> Any:
        """Outputs of a checked call."""
        chosen = self.select_impl(query, key, value, call, impl)
        with without_autocast(query.device):
            if chosen in self.with_kernels or (chosen in self.dispatched and is_compiled_on_cpu(query)):
                return self.dispatch(chosen, query, key, value, call)
            return self.module(chosen).attend(query, key, value, call)

    def dispatch(self, impl: str, query: Tensor, key: Tensor, value: Tensor, call: Any) -> Any:
        """Outputs by the dispatcher's operator of an implementation."""
        if self.prepare is not None:
            query, key, value, call = self.prepare(query, key, value, call)
        outputs = self.dispatched[impl](query, key, value, *self.codec.flatten(call))
        if all(self.flows):
            return outputs
        shown = [x for x, flow in zip(outputs, self.flows, strict=True) if flow]
        return shown[0] if len(shown) == 1 else shown

    # the public face

    def public(
        self, make_call: Callable, *, summarize: Callable[..., dict] | None = None
    ) -> Callable[[Callable], Callable]:
        """Decorator of a public function, whose call is `make_call(query, key, value, **arguments)`.

        `summarize` replaces that of the operator, for a function that knows more of its calls.
        """

        def register(function: Callable) -> Callable:
            FUNCTIONS[function.__name__] = Public(self, make_call, summarize or self.summarize)
            for impl in self.modules:
                if impl not in self.with_kernels:  # a graph that traces the call cannot import
                    self.module(impl)
            return function

        return register

    # torch's dispatcher

    def _define(self, name: str, impl: str) -> Callable:
        """Define the operator of an implementation and that of its gradient; returns the former."""
        forward_name, backward_name = f"foveal::{name}_forward", f"foveal::{name}_backward"
        outputs = ", ".join(["Tensor"] * len(self.flows))
        saved = ", ".join(f"Tensor out_{i}" for i in range(len(self.flows)))
        into = ", ".join(f"Tensor grad_{i}" for i, flow in enumerate(self.flows) if flow)
        gradients = ", ".join(["Tensor"] * (3 + len(self.places)))
        torch.library.define(forward_name, f"(Tensor query, Tensor key, Tensor value, {self.arguments}) -> ({outputs})")
        torch.library.define(
            backward_name,
            f"(Tensor query, Tensor key, Tensor value, {saved}, {into}, {self.arguments}, bool[] wanted) -> "
            f"({gradients})",
        )
        build, counts = self.codec.build, (len(self.flows), sum(self.flows))

        def split(rest: Sequence) -> tuple[Sequence, Sequence, Sequence, Sequence[bool]]:
            """Outputs, their gradients, arguments of the call, and which fields need a gradient."""
            first, second = counts[0], sum(counts)
            return rest[:first], rest[first:second], rest[second:-1], rest[-1]

        def forward(query, key, value, *rest):
            found = self.module(impl).forward(query, key, value, build(rest))
            return tuple(x.contiguous() for x in found)

        def backward(query, key, value, *rest):
            outs, grads, arguments, wanted = split(rest)
            found = self.module(impl).backward(query, key, value, outs, grads, build(arguments), wanted)
            of_fields = (x if want else None for x, want in zip(found[3:], wanted, strict=True))
            return tuple(query.new_empty(0) if x is None else x.contiguous() for x in (*found[:3], *of_fields))

        def forward_fake(query, key, value, *rest):
            return self.fake(query, key, value, build(rest))

        def backward_fake(query, key, value, *rest):
            _, _, arguments, wanted = split(rest)
            fields = [arguments[place] if want else None for place, want in zip(self.places, wanted, strict=True)]
            of_fields = [query.new_empty(0) if x is None else x.new_empty(x.shape) for x in fields]
            return *(x.new_empty(x.shape) for x in (query, key, value)), *of_fields

        def forward_flops(query, key, value, *rest, out_val=None, **_) -> int:
            return self.flops(query, key, value, build(rest))[0]

        def backward_flops(query, key, value, *rest, out_val=None, **_) -> int:
            return self.flops(query, key, value, build(split(rest)[2]))[1]

        operator = getattr(torch.ops.foveal, f"{name}_forward")
        of_gradient = getattr(torch.ops.foveal, f"{name}_backward")
        torch.library.impl(forward_name, "default")(forward)
        torch.library.impl(backward_name, "default")(backward)
        torch.library.register_fake(forward_name)(forward_fake)
        torch.library.register_fake(backward_name)(backward_fake)
        torch.library.register_autograd(
            forward_name, self._differentiate(of_gradient), setup_context=self._setup_context
        )
        torch.library.register_autograd(backward_name, self._refuse_double_backward)
        register_flop_formula(operator, get_raw=True)(forward_flops)
        register_flop_formula(of_gradient, get_raw=True)(backward_flops)
        return operator

    def _setup_context(self, ctx, inputs, output) -> None:
        """Save tensors for the backward pass, and the other arguments with the places of those tensors."""
        given = inputs[3:]
        ctx.mark_non_differentiable(*(x for x, flow in zip(output, self.flows, strict=True) if not flow))
        ctx.tensors = [place for place, x in enumerate(given) if isinstance(x, Tensor)]
        ctx.arguments = [None if isinstance(x, Tensor) else x for x in given]
        ctx.save_for_backward(*inputs[:3], *output, *(given[place] for place in ctx.tensors))

    def _differentiate(self, of_gradient: Callable) -> Callable:
        count = len(self.flows)

        def differentiate(ctx, *grads):
            grads = [grad for grad, flow in zip(grads, self.flows, strict=True) if flow]
            query, key, value, *rest = ctx.saved_tensors
            arguments = list(ctx.arguments)
            for place, x in zip(ctx.tensors, rest[count:], strict=True):
                arguments[place] = x
            wanted = [ctx.needs_input_grad[3 + place] for place in self.places]
            dq, dk, dv, *found = of_gradient(query, key, value, *rest[:count], *grads, *arguments, wanted)
            of_arguments: list[Tensor | None] = [None] * len(arguments)
            for place, want, grad in zip(self.places, wanted, found, strict=True):
                of_arguments[place] = grad if want else None
            return dq, dk, dv, *of_arguments

        return differentiate

    def _refuse_double_backward(self, ctx, *_) -> None:
        raise NotImplementedError(f"{self.title} has no double backward; use impl='reference'")
