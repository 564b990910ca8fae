"""Lengths that may be symbols, as they are while a graph with dynamic shapes is traced.

A comparison of symbols decides how the graph goes on, and binds it to lengths of which the answer is the same. A graph
that `torch.compile` makes may be bound: it is made again for others. An exported graph has to serve all lengths.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .calling import tracing


def _follows(condition) -> bool:
    """Return whether a condition holds whatever its symbols stand for."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # it brings sympy

    return statically_known_true(condition)


def known(condition) -> bool:
    """Return whether a condition holds; in a graph that must not be bound, whether for all values of symbols."""
    if condition is True or condition is False:
        return condition
    return _follows(condition) if tracing() and not torch.compiler.is_dynamo_compiling() else bool(condition)


def is_symbol(length: int) -> bool:
    """Return whether a length of an exported graph is a symbol.

    `torch.compile` calls its symbols integers: it compiles again for lengths that a graph does not serve.
    """
    return isinstance(length, torch.SymInt)


def plain(length: int) -> int:
    """A length that is a plain number, and 0 where it is a symbol or may be one."""
    return 0 if torch.compiler.is_dynamo_compiling() or is_symbol(length) else length


def ceil_div(length: int, by: int) -> int:
    """length / by, rounded up."""
    whole = length // by  # which cancels factors, where a remainder does not
    exact = _follows(whole * by == length) if tracing() else whole * by == length
    return whole if exact else (length + by - 1) // by


def round_up(length: int, side: int) -> int:
    """The multiple of `side` that is no less than `length`."""
    return ceil_div(length, side) * side


def at_least(side: int, length: int) -> int:
    """The larger of the two."""
    if known(length >= side):
        return length
    return side if known(length <= side) else torch.sym_max(length, side)  # pyright: ignore[reportReturnType]


def at_most(side: int, length: int) -> int:
    """The smaller of the two; `side` where symbols leave that open, for what takes a side beyond the length, too."""
    return length if known(length <= side) else side


def modulo(x: Tensor, n: int) -> Tensor:
    """x % n of integers. ONNX has no remainder by a length that its inputs decide, only the quotient."""
    return x - x // n * n if is_symbol(n) else x % n


def unravel(index: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Coordinates of flat numbers in C order."""
    parts = []
    for n in reversed(counts):
        parts.append(modulo(index, n))
        index = index // n
    return parts[::-1]


def ravel(parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The inverse of `unravel`."""
    flat = parts[0]
    for part, n in zip(parts[1:], counts[1:], strict=True):
        flat = flat * n + part
    return flat


def exporting() -> bool:
    """Return whether a graph is made to be exported, by tracing operators one by one."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
