"""Explain a call of an attention operator: its implementation, why not the others, and its cost.

    python -m foveal.kernels.tools.explain --op na3d --shape 30 48 80 --heads 24 --head-dim 128 --window 18 24 24

An operator takes part by its declaration, see `common/operator.py`.
"""

from __future__ import annotations

import argparse
import inspect
from ast import literal_eval
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..common.arguments import check_arguments
from ..common.calling import Impl
from ..common.operator import FUNCTIONS
from ..ragged.api import options_of
from ..ragged.groups import attend_groups
from ..ragged.layout import Group, RaggedLayout, find_groups, find_order


@dataclass(frozen=True)
class Explanation:
    """Findings of `explain`.

    Attributes:
        operator: name of the operator.
        call: device, dtype and shape of the query.
        impl: the implementation that serves the call; None when the one asked for cannot take it.
        reasons: for every implementation, why it cannot take the call, or None when it can.
        cost: quantities of the call by name: pairs, FLOPs, bytes, tiles.
    """

    operator: str
    call: str
    impl: str | None
    reasons: dict[str, str | None]
    cost: dict[str, int | float | str]

    def __str__(self) -> str:
        width = max(map(len, (*self.reasons, *self.cost)))
        lines = [f"{self.operator} of {self.call} takes: {self.impl or 'nothing, the implementation asked for cannot'}"]
        for impl, reason in self.reasons.items():
            can = "chosen" if impl == self.impl else f'can take the call: ask for it with impl="{impl}"'
            lines.append(f"  {impl:<{width}}  {can if reason is None else f'cannot: {reason}'}")
        lines += [f"  {name.replace('_', ' '):<{width}}  {_readable(name, value)}" for name, value in self.cost.items()]
        return "\n".join(lines)


def _readable(name: str, value: int | float | str) -> str:
    if isinstance(value, str):
        return value
    unit = "FLOP" if name.endswith("flops") else "B" if name.endswith("bytes") else ""
    if not unit:
        return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.2f} {prefix}{unit}"
    return f"{value} {unit}"


def _operators() -> dict[str, Callable]:
    """The public functions of declared operators, by name."""
    ops = import_module("..ops", __package__)  # declares them
    return {name: getattr(ops, name) for name in ops.__all__ if name in FUNCTIONS}


def _find(operator: Callable | str) -> tuple[str, Callable]:
    """Name and function of an operator."""
    known = _operators()
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", repr(operator))
    if name not in known or not (isinstance(operator, str) or operator is known[name]):
        raise ValueError(f"operator={operator!r} must be one of {sorted(known)} or its name")
    return name, known[name]


def _without_data(value):
    """Dense tensors inside `value` on the meta device; others stay for the operator to refuse."""

    def empty(x: Tensor) -> Tensor:
        dense = not x.is_nested and x.layout == torch.strided
        return torch.empty(x.shape, dtype=x.dtype, device="meta") if dense else x

    return tree_map_only(Tensor, empty, value)


def explain(
    operator: Callable | str, query: Tensor, key: Tensor, value: Tensor, *, impl: Impl = "auto", **arguments
) -> Explanation:
    """Say which implementation a call takes and why not the others, without computing it.

    Args:
        operator: an operator of `foveal.kernels.ops`, or its name.
        query, key, value: as the operator takes them. Only shape, strides, dtype and device are looked at, so tensors
            without data will do: on the meta device, or under `FakeTensorMode` to ask about a device that is not there.
        impl: as the operator takes it. An implementation that cannot take the call is reported, not raised.
        **arguments: the keyword arguments of the operator. With `sizes`, and `key_sizes`, query, key and value are
            packed tokens of a ragged batch, as for `ragged_attention`: costs of its batches are added.

    Returns:
        An `Explanation`; print it for a summary.

    Raises:
        ValueError: an unknown operator or implementation.
        ValueError, TypeError: arguments that the operator itself would refuse.
    """
    if "sizes" in arguments:
        return _explain_ragged(operator, query, key, value, impl=impl, **arguments)
    name, function = _find(operator)
    choice = "impl" in inspect.signature(function).parameters
    check_arguments(function, query, key, value, **arguments, **({"impl": impl} if choice else {}))
    for name_of_output in ("return_lse", "return_state"):  # changes neither the implementation nor the cost
        arguments.pop(name_of_output, None)
    call = f"{tuple(query.shape)} {str(query.dtype).removeprefix('torch.')} on {query.device}"

    # how tensors fit together, checked by the operator on some without data
    rest = {name: _without_data(value) for name, value in arguments.items()}
    function(*map(_without_data, (query, key, value)), **rest, **({"impl": "reference"} if choice else {}))
    declared, make_call, summarize = FUNCTIONS[name]
    checked = make_call(query, key, value, **arguments)
    reasons = declared.unsupported_reasons(query, key, value, checked)
    chosen = None if reasons.get(impl) else declared.select_impl(query, key, value, checked, impl)
    cost = {} if summarize is None else summarize(query, key, value, checked, chosen)
    return Explanation(name, call, chosen, reasons, cost)


def _explain_ragged(
    operator: Callable | str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sizes: RaggedLayout | Sequence,
    key_sizes: RaggedLayout | Sequence | None = None,
    **arguments,
) -> Explanation:
    """The sum of the dense batches that `ragged_attention` makes, and of the tokens that it gathers for them."""
    layout = RaggedLayout.of(sizes)
    key_layout = layout if key_sizes is None else RaggedLayout.of(key_sizes)
    parts: list[Explanation] = []

    def attend(group: Group, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = options_of(group, arguments, *tensors[:2])
        parts.append(explain(operator, *tensors, **given))
        out = tensors[0].new_empty(*tensors[0].shape[:-1], tensors[2].shape[-1])
        return out, out[..., 0]

    with torch.no_grad():
        attend_groups(attend, query, key, value, layout, key_layout)
    if not parts:
        raise ValueError(f"sizes={list(layout.sizes)} must have an entry with tokens")
    cost: dict[str, int | float | str] = {"entries": len(layout), "batches": len(parts)}
    gathered = find_order(layout.sizes, find_groups(layout.sizes, key_layout.sizes), query.device).tokens is not None
    moved = (query, key, value, query[..., :1].expand(*query.shape[:-1], value.shape[-1]))  # the output, too
    cost["gathered_bytes"] = 2 * sum(x.numel() * x.element_size() for x in moved) if gathered else 0
    for name in parts[0].cost:  # ratios of one batch say nothing of all
        found = [part.cost.get(name) for part in parts]
        if name.endswith(("flops", "bytes", "pairs")) and all(isinstance(x, (int, float)) for x in found):
            cost[name] = sum(x for x in found if isinstance(x, (int, float)))
    reasons = {name: next((p.reasons[name] for p in parts if p.reasons[name]), None) for name in parts[0].reasons}
    impls = {part.impl for part in parts}
    call = f"a ragged batch {tuple(query.shape)} {str(query.dtype).removeprefix('torch.')} on {query.device}"
    chosen = impls.pop() if len(impls) == 1 else ", ".join(sorted(map(str, impls)))
    return Explanation(parts[0].operator, call, chosen, reasons, cost)


def _operator_arguments(words: Sequence[str]) -> dict:
    """`--window 7 --stride 2 1` as `{"window": 7, "stride": (2, 1)}`.

    Raises:
        ValueError: a value without a name, or one that is no Python literal.
    """
    values: dict[str, list] = {}
    for word in words:
        if word.startswith("--"):
            values[word[2:].replace("-", "_")] = current = []
        elif values:
            try:
                current.append(literal_eval(word))
            except (ValueError, SyntaxError):
                raise ValueError(f"{word!r} must be a number, True or False") from None
        else:
            raise ValueError(f"{word!r} has no --name before it")
    return {name: v[0] if len(v) == 1 else tuple(v) for name, v in values.items()}


def main(arguments: Sequence[str] | None = None, *, prog: str = "python -m foveal.kernels.tools.explain") -> None:
    """Explain a call given on the command line; its device need not be there. `prog` is the command's name in help."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    parser = argparse.ArgumentParser(
        prog=prog,
        description="Which implementation a call takes, and what it costs.",
        epilog="Every other --name with its values is an argument of the operator: --window 7 --causal True False",
    )
    add = parser.add_argument
    add("--op", required=True, choices=sorted(_operators()))
    add("--shape", type=int, nargs="+", required=True, help="tokens along each axis")
    add("--batch", type=int, default=1)
    add("--heads", type=int, default=1)
    add("--key-heads", type=int, help="default: --heads")
    add("--head-dim", type=int, default=64)
    add("--dtype", choices=("float16", "bfloat16", "float32", "float64"), default="bfloat16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--impl", default="auto")
    args, rest = parser.parse_known_args(arguments)
    try:
        with FakeTensorMode():
            query, key = (
                torch.empty(
                    args.batch, *args.shape, heads, args.head_dim, dtype=getattr(torch, args.dtype), device=args.device
                )
                for heads in (args.heads, args.key_heads or args.heads)
            )
        print(explain(args.op, query, key, key, impl=args.impl, **_operator_arguments(rest)))
    except (ValueError, TypeError, RuntimeError) as error:  # torch raises the last for an unknown device
        parser.error(str(error))


if __name__ == "__main__":
    main()
