"""Maps completed by zeros, right and bottom, and cut again: also while a graph with dynamic sizes is traced."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.common.symbolic import is_symbol, known, round_up


def complete(x: Tensor, lengths: Sequence[int], *, first: int = 1) -> Tensor:
    """Zeros after the last token of axes from `first` on, which get these lengths; itself if none is missing."""
    missing = [length - n for length, n in zip(lengths, x.shape[first:], strict=False)]
    if all(known(m == 0) for m in missing):
        return x
    after = [0] * (x.dim() - first - len(missing)) + missing[::-1]
    return F.pad(x, [side for m in after for side in (0, m)])


def complete_multiples(x: Tensor, sides: Sequence[int], *, first: int = 1) -> Tensor:
    """`complete` to multiples of `sides`."""
    return complete(x, [round_up(n, side) for n, side in zip(x.shape[first:], sides, strict=False)], first=first)


def crop(x: Tensor, lengths: Sequence[int], *, first: int = 1) -> Tensor:
    """The first tokens of axes from `first` on, as many as `lengths` says; itself if they have no more."""
    for axis, length in enumerate(lengths, first):
        if known(length == x.shape[axis]):
            continue
        if is_symbol(length):  # a slice would bind the graph: whether its axes can be joined depends on the length
            x = x.index_select(axis, torch.arange(length, device=x.device))
        else:
            x = x.narrow(axis, 0, length)
    return x
