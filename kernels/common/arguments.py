"""Checks of the kind of each argument of a public operator, by annotation; they come before its own.

Operators know how tensors fit together; that arguments are dense tensors of a dtype and on a device that they compute
with, numbers, booleans or the name of an implementation is checked here, for all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from inspect import signature
from numbers import Real
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

from .calling import IMPLEMENTATIONS, ON_REQUEST, Impl, Mask, PerAxis, PerHead, entries, is_integer

P = ParamSpec("P")
R = TypeVar("R")
Given = tuple[str, Any]  # the name and value of the first argument of a call
Check = Callable[[str, Any, Given], object]  # of the name of an argument, its value, and the first argument
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACCEPTED_DTYPES = "float16, bfloat16, float32 or float64"


def check_dense(name: str, x: Any, accepted: str = "a tensor") -> None:
    """Refuse what is no tensor, and tensors without strides: sparse and nested ones."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be {accepted}, got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested one" if x.is_nested else f"one of layout {x.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


def _is_elsewhere(x: Tensor, first: Any) -> bool:
    return isinstance(first, Tensor) and x.device != first.device


def _check_operand(name: str, x: Any, first: Given) -> None:
    check_dense(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}.dtype={x.dtype} must be {ACCEPTED_DTYPES}")
    if _is_elsewhere(x, first[1]):
        raise ValueError(f"{name}.device={x.device} must equal {first[0]}.device={first[1].device}")


def _check_addition(name: str, x: Any, first: Given) -> None:
    """`_check_operand` for a tensor that may be left out."""
    check_dense(name, x, "a tensor or None")
    if x.dtype not in DTYPES or _is_elsewhere(x, first[1]):
        raise ValueError(f"{name} ({x.dtype}, {x.device}) must be {ACCEPTED_DTYPES} on the device of {first[0]}")


def _check_number(name: str, x: Any, first: Given) -> None:
    """A tensor is no number, not even one of a single element: no gradient would reach it."""
    if isinstance(x, bool) or not isinstance(x, (float, int, torch.SymFloat, torch.SymInt, Real)):
        raise TypeError(f"{name}={x!r} must be a real number, got {type(x).__name__}")


def _check_number_or_tensor(name: str, x: Any, first: Given) -> None:
    (_check_addition if isinstance(x, Tensor) else _check_number)(name, x, first)


def _check_integer(name: str, x: Any, first: Given) -> None:
    if not is_integer(x):
        raise TypeError(f"{name}={x!r} must be an integer, got {type(x).__name__}")


def _check_flag(name: str, x: Any, first: Given) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name}={x!r} must be True or False, got {type(x).__name__}")


def _check_dtype(name: str, x: Any, first: Given) -> None:
    if not isinstance(x, torch.dtype):
        raise TypeError(f"{name}={x!r} must be a torch.dtype, got {type(x).__name__}")


def _check_text(name: str, x: Any, first: Given) -> None:
    if not isinstance(x, str):
        raise TypeError(f"{name}={x!r} must be a string, got {type(x).__name__}")


def _check_impl(name: str, x: Any, first: Given) -> None:
    if x not in (accepted := ("auto", *IMPLEMENTATIONS, *ON_REQUEST)):
        raise ValueError(f"{name}={x!r} must be one of {accepted}")


def _check_axes(kind: type, name: str, x: Any, first: Given) -> None:
    entries(name, x, kind)


def _check_heads(kind: type, name: str, x: Any, first: Given) -> None:
    """One value, one per axis, or one of these per head."""
    if isinstance(x, Sequence) and not isinstance(x, str) and any(isinstance(entry, Sequence) for entry in x):
        for head, entry in enumerate(x):
            entries(f"{name}[{head}]", entry, kind)
    else:
        entries(name, x, kind)


def _check_mask(name: str, x: Any, first: Given) -> None:
    check_dense(name, x, "a tensor or None")
    if x.dtype.is_floating_point or x.dtype.is_complex:
        raise TypeError(f"{name}.dtype={x.dtype} must be bool or an integer dtype")
    if _is_elsewhere(x, first[1]):
        raise ValueError(f"{name}.device={x.device} must equal {first[0]}.device={first[1].device}")


def _check_sequence(check: Check, name: str, x: Any, first: Given) -> None:
    """Entries of a sequence are compared with the first of them."""
    if not isinstance(x, Sequence) or isinstance(x, str):
        raise TypeError(f"{name} must be a list or tuple, got {type(x).__name__}")
    for i, entry in enumerate(x):
        check(f"{name}[{i}]", entry, (f"{name}[0]", x[0]))


def _check_class(kind: type, name: str, x: Any, first: Given) -> None:
    if not isinstance(x, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(x).__name__}")


REQUIRED: Mapping[Any, Check] = {
    Tensor: _check_operand,
    float: _check_number,
    float | Tensor: _check_number_or_tensor,
    int: _check_integer,
    bool: _check_flag,
    str: _check_text,
    PerAxis[int]: partial(_check_axes, int),
    PerAxis[bool]: partial(_check_axes, bool),
    PerHead[int]: partial(_check_heads, int),
    PerHead[bool]: partial(_check_heads, bool),
    Mask: _check_mask,
    Sequence[int]: partial(_check_sequence, _check_integer),
    Sequence[Tensor]: partial(_check_sequence, _check_operand),
    torch.dtype: _check_dtype,
    Impl: _check_impl,
}
OPTIONAL = {kind | None: check for kind, check in REQUIRED.items()} | {Tensor | None: _check_addition}
_CHECKS: dict[Callable, dict[str, Check]] = {}  # by operator and argument


def _find_check(annotation: Any) -> Check:
    if annotation in REQUIRED:
        return REQUIRED[annotation]
    if annotation in OPTIONAL:
        check = OPTIONAL[annotation]
        return lambda name, x, first: None if x is None else check(name, x, first)
    if isinstance(annotation, type):
        return partial(_check_class, annotation)
    if isinstance(annotation, UnionType) and len(of := [x for x in get_args(annotation) if x is not NoneType]) == 1:
        of_class = _find_check(of[0])
        return lambda name, x, first: None if x is None else of_class(name, x, first)
    raise TypeError(f"nothing is known of arguments that are {annotation}: common/arguments.py needs a check")


def operator(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public operator: what kind its arguments are is checked before it runs.

    Raises:
        TypeError: an annotation without a check, when the operator is defined.
    """
    checks = {x.name: _find_check(x.annotation) for x in signature(function, eval_str=True).parameters.values()}

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        _check(checks, args, kwargs)
        return function(*args, **kwargs)

    _CHECKS[checked] = checks
    return checked


def check_arguments(function: Callable, *args: Any, **kwargs: Any) -> None:
    """Check the arguments of a call of an operator without making it.

    Raises:
        ValueError, TypeError: an argument of a kind that is not accepted; the message names it and its value.
    """
    _check(_CHECKS[function], args, kwargs)


def _check(checks: Mapping[str, Check], args: Sequence, kwargs: Mapping[str, Any]) -> None:
    given = dict(zip(checks, args, strict=False)) | dict(kwargs)
    name = next(iter(checks))
    first = name, given.get(name)
    for name, check in checks.items():
        if name in given:
            check(name, given[name], first)
