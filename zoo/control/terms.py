"""Edits that are linear in the attention map, composed on the values: no map of queries x keys is made.

The edited map of a row is a sum of terms `weight * softmax(Q_read K_read^T) @ right`, so its output is one attention
of the read row's queries and keys to `right @ value` of the written row. All terms of an operation are rows of one
attention call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..sites import Call
from .rows import expand


@dataclass(frozen=True)
class Term:
    """A part of the map of some rows.

    Attributes:
        write: rows whose output it is part of.
        read: rows whose queries and keys make the map, one for each written row.
        right: factor on the map's columns: `[keys]` for each, `[keys, keys]` for a matrix, None for 1.
        weight: factor on the output: a number, a 0-d tensor, or `[queries]`.
    """

    write: tuple[int, ...]
    read: tuple[int, ...]
    right: Tensor | None = None
    weight: float | Tensor = 1.0

    @property
    def plain(self) -> bool:
        """True for the model's own map."""
        return self.write == self.read and self.right is None and isinstance(self.weight, float) and self.weight == 1

    def times(self, right: Tensor | None = None, weight: float | Tensor = 1.0) -> Term:
        """The term with its map multiplied from the right, and its output by a weight."""
        return replace(self, right=compose(self.right, right), weight=self.weight * weight)


def plain_terms(batch: int) -> list[Term]:
    """The maps of a model without edits."""
    return [Term(tuple(range(batch)), tuple(range(batch)))]


def take(terms: Iterable[Term], rows: Sequence[int]) -> tuple[list[Term], list[Term]]:
    """Terms that write some rows, and terms that write the others."""
    inside: list[Term] = []
    outside: list[Term] = []
    for term in terms:
        for found, chosen in ((inside, True), (outside, False)):
            pairs = [pair for pair in zip(term.write, term.read, strict=True) if (pair[0] in rows) == chosen]
            if pairs:
                write, read = zip(*pairs, strict=True)
                found.append(replace(term, write=write, read=read))
    return inside, outside


def copy_terms(terms: Iterable[Term], sources: Sequence[int], targets: Sequence[int]) -> list[Term]:
    """The terms of the source rows, written to the target rows."""
    copied = []
    for term in terms:
        read = dict(zip(term.write, term.read, strict=True))
        pairs = [(target, read[source]) for source, target in zip(sources, targets, strict=True) if source in read]
        if pairs:
            write, reads = zip(*pairs, strict=True)
            copied.append(replace(term, write=write, read=reads))
    return copied


def compose(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Product of two factors on the columns, each `[keys]`, `[keys, keys]` or None."""
    if first is None or second is None:
        return second if first is None else first
    if first.dim() == 1 and second.dim() == 2:
        return first[:, None] * second
    return first * second if second.dim() == 1 else first @ second


def apply_right(right: Tensor | None, value: Tensor) -> Tensor:
    """`right @ value` for value `[B, keys, heads, d]`."""
    if right is None:
        return value
    right = right.to(value)
    return value * right[:, None, None] if right.dim() == 1 else torch.einsum("km,bmhd->bkhd", right, value)


def merge(terms: Sequence[Term]) -> list[Term]:
    """Terms of equal rows and weights added up: their factors on the columns are, too."""
    merged: dict[tuple, Term] = {}
    for term in terms:
        weight = term.weight if isinstance(term.weight, float | int) else id(term.weight)
        key = (term.write, term.read, weight)
        other = merged.get(key)
        if other is None:
            merged[key] = term
        elif other.right is not None and term.right is not None:
            both = (other.right, term.right)
            left, right = (x if x.dim() == max(y.dim() for y in both) else torch.diag(x) for x in both)
            merged[key] = replace(other, right=left + right)
        else:
            merged[(*key, len(merged))] = term
    return list(merged.values())


def run(terms: Sequence[Term], call: Call, attend: Callable[[Call, Sequence[int]], Tensor], batch: int) -> Tensor:
    """Output of an operation with these terms.

    Args:
        terms: that write every row.
        call: the operation; it may hold several sequences of each of the `batch` rows.
        attend: attends, given the operation and the rows that its queries are of.
        batch: rows that the terms count.
    """
    if len(terms) == 1 and terms[0].plain:
        return attend(call, terms[0].read)
    terms = merge(terms)
    factor = call.query.shape[0] // batch
    reads = [row for term in terms for row in term.read]
    index = torch.tensor(expand(reads, factor), device=call.query.device)
    values = torch.cat([apply_right(t.right, call.value[expand(t.write, factor)]) for t in terms])
    mask = call.mask
    if mask is not None and mask.dim() >= 3 and mask.shape[0] == call.query.shape[0]:
        mask = mask[index]
    part = replace(call, query=call.query[index], key=call.key[index], value=values, mask=mask)
    outs = attend(part, reads).split([len(t.write) * factor for t in terms])
    out = outs[0].new_zeros(call.query.shape[0], *outs[0].shape[1:])
    first: set[int] = set()
    for term, x in zip(terms, outs, strict=True):
        rows = expand(term.write, factor)
        weight = term.weight
        if isinstance(weight, Tensor):
            x = x * (weight.to(x)[:, None, None] if weight.dim() else weight.to(x))
        elif weight != 1:
            x = x * weight
        new = not first & set(term.write)
        first |= set(term.write)
        where = torch.tensor(rows, device=out.device)
        # the first term of a row is copied: a sum with zero would lose the sign of zero
        out = out.index_copy(0, where, x) if new else out.index_add(0, where, x)
    return out
