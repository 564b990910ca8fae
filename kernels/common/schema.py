"""Flatten the dataclass that describes a call into arguments of a dispatcher operator, and build it again.

`torch.library` takes tensors, numbers, strings and lists of them. A field of a call becomes

    Tensor, int, float, bool, str, torch.dtype, or None instead     one argument
    tuple[int, ...], tuple[bool, ...]                               one list
    tuple[T, U] of fixed length, or None                            an argument per item
    a dataclass or NamedTuple                                       its fields, with the field's name before theirs
    tuple[N, ...] of a NamedTuple N                                 a list per field of N

Integers are `SymInt`, so that a compiled graph keeps symbolic lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

SCALARS = {Tensor: "Tensor", int: "SymInt", float: "float", bool: "bool", str: "str", torch.dtype: "ScalarType"}


class Codec(NamedTuple):
    """Translation of values of one type.

    Attributes:
        arguments: (schema type, suffix of the name) per argument.
        flatten: value → arguments.
        build: arguments → value.
    """

    arguments: tuple[tuple[str, str], ...]
    flatten: Callable[[Any], Sequence]
    build: Callable[[Sequence], Any]


def _required(kind: Any) -> tuple[Any, bool]:
    """A type without None, and whether None was part of it."""
    if get_origin(kind) not in (Union, UnionType):
        return kind, False
    (kept,) = [option for option in get_args(kind) if option is not NoneType]
    return kept, NoneType in get_args(kind)


def _is_named_tuple(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _names(kind: type) -> tuple[str, ...]:
    return kind._fields if _is_named_tuple(kind) else tuple(field.name for field in fields(kind))


def codec(kind: Any) -> Codec:
    """Codec of an annotation.

    Raises:
        TypeError: a type that no schema can express.
    """
    kept, optional = _required(kind)
    mark = "?" if optional else ""
    if kept in SCALARS:
        return Codec(((SCALARS[kept] + mark, ""),), lambda value: (value,), lambda found: found[0])
    if is_dataclass(kept) or _is_named_tuple(kept):
        return _record(kept)
    if get_origin(kept) is tuple and get_args(kept)[-1] is Ellipsis:
        return _sequence(get_args(kept)[0], mark)
    if get_origin(kept) is tuple:
        return _items(get_args(kept), optional)
    raise TypeError(f"{kind!r} cannot be an argument of an operator")


def _record(kind: Any) -> Codec:
    """Fields one after another."""
    hints = get_type_hints(kind)
    names = _names(kind)
    parts = [codec(hints[name]) for name in names]
    arguments = tuple((schema, f"_{name}{suffix}") for name, part in zip(names, parts, strict=True)
                      for schema, suffix in part.arguments)  # fmt: skip

    def flatten(value) -> list:
        return [x for name, part in zip(names, parts, strict=True) for x in part.flatten(getattr(value, name))]

    def build(found: Sequence):
        values, at = [], 0
        for part in parts:
            values.append(part.build(found[at : at + len(part.arguments)]))
            at += len(part.arguments)
        return kind(*values)

    return Codec(arguments, flatten, build)


def _sequence(item: Any, mark: str) -> Codec:
    """A list, or for tuples of a NamedTuple a list per field."""
    if item in (int, bool, float):
        schema = f"{SCALARS[item]}[]{mark}"
        return Codec(
            ((schema, ""),), lambda value: (value,), lambda found: None if found[0] is None else tuple(found[0])
        )
    if not _is_named_tuple(item):
        raise TypeError(f"tuple[{item!r}, ...] cannot be an argument of an operator")
    hints = get_type_hints(item)
    columns = [_column(hints[name]) for name in item._fields]
    arguments = tuple((column.arguments[0][0], f"_{name}") for name, column in zip(item._fields, columns, strict=True))

    def flatten(value) -> list:
        return [column.flatten(x)[0] for column, x in zip(columns, zip(*value, strict=True), strict=True)]

    def build(found: Sequence) -> tuple:
        rows = zip(*(column.build((x, len(found[0]))) for column, x in zip(columns, found, strict=True)), strict=True)
        return tuple(item(*row) for row in rows)

    return Codec(arguments, flatten, build)


def _column(kind: Any) -> Codec:
    """One field of several NamedTuples: a list of numbers, or of pairs of at least zero or None."""
    kept, optional = _required(kind)
    if kept in (int, bool) and not optional:
        return Codec(((f"{SCALARS[kept]}[]", ""),), lambda values: (values,), lambda found: found[0])
    if optional and get_args(kept) == (int, int):
        return Codec((("SymInt[]?", ""),), lambda values: (_joined(values),), lambda found: _split(*found))
    raise TypeError(f"{kind!r} cannot be a column of an operator's arguments")


def _joined(pairs: Iterable[tuple[int, int] | None]) -> list[int] | None:
    """Numbers of pairs one after another, -1 twice for one that is None; None if all are."""
    pairs = list(pairs)
    return None if all(pair is None for pair in pairs) else [x for pair in pairs for x in pair or (-1, -1)]


def _split(values: Sequence[int] | None, count: int) -> list[tuple[int, int] | None]:
    """The `count` pairs of `_joined`."""
    if values is None:
        return [None] * count
    pairs = zip(values[::2], values[1::2], strict=True)
    return [None if first < 0 else (first, last) for first, last in pairs]


def _items(kinds: Sequence[Any], optional: bool) -> Codec:
    """An argument per item."""
    parts = [codec(kind | None if optional else kind) for kind in kinds]
    if any(len(part.arguments) != 1 for part in parts):
        raise TypeError(f"tuple{list(kinds)} cannot be an argument of an operator")
    arguments = tuple((part.arguments[0][0], f"_{i}") for i, part in enumerate(parts))
    absent = (None,) * len(parts)
    return Codec(
        arguments,
        lambda value: absent if value is None else value,
        lambda found: None if optional and found[0] is None else tuple(found),
    )
