"""Relative position tables, spread over the pairs of a window."""

from collections.abc import Sequence

from torch import Tensor


def spread_bias(table: Tensor, window: Sequence[int], halos: Sequence[int] | None = None) -> Tensor:
    """Bias `[heads, window tokens, key tokens]` of a table `[heads, *(2 * (window + halo) - 1)]`, unchecked."""
    for axis, (w, h) in enumerate(zip(window, halos or (0,) * len(window), strict=True), 1):
        table = table.unfold(axis, w + 2 * h, 1)  # from the last query of the axis to the first
    return table.flip(tuple(range(1, 1 + len(window)))).flatten(1 + len(window)).flatten(1, -2)
