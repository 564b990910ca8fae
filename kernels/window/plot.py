"""Pictures of windows: which tokens share one, and which keys a query sees."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..common.calling import PerAxis
from . import geometry
from .geometry import make_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUERY, KEY, TINTS, INK = "#d55e00", "#56b4e9", ("#dee2e6", "#f8f9fa"), "#343a40"


def window_classes(
    shape: Sequence[int],
    query: Sequence[int],
    *,
    window: PerAxis[int],
    shift: PerAxis[int] = 0,
    halo: PerAxis[int] = 0,
) -> Tensor:
    """Class of each token in a picture: 0 or 1, the tint of its window; 2, a key of `query`; 3, `query` itself."""
    axes = make_axes(shape, window=window, shift=shift, halo=halo)
    stretch = [torch.zeros(a.length, dtype=torch.int64) for a in axes]
    for line, axis in zip(stretch, axes, strict=True):
        starts = [r.query + j * axis.window for r in geometry.runs(axis) for j in range(r.count)]
        line[torch.tensor(starts)] = 1
    rows, columns = (line.cumsum(0) for line in stretch)
    sees = [geometry.axis_key_slots(a)[q] >= 0 for a, q in zip(axes, query, strict=True)]
    classes = (rows[:, None] + columns) % 2
    classes[sees[0][:, None] & sees[1]] = 2
    classes[tuple(query)] = 3
    return classes


def _panel(ax: Axes, classes: Tensor, title: str, caption: str) -> None:
    from matplotlib.colors import ListedColormap

    ax.imshow(classes.numpy(), cmap=ListedColormap([*TINTS, KEY, QUERY]), vmin=0, vmax=3, interpolation="none")
    for side, n in (("x", classes.shape[1]), ("y", classes.shape[0])):
        getattr(ax, f"set_{side}ticks")([])
        getattr(ax, f"set_{side}ticks")([i - 0.5 for i in range(n + 1)], minor=True)
    ax.grid(which="minor", color="#ced4da", linewidth=0.5)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=11, fontweight="bold", color=INK, pad=8)
    ax.set_xlabel(caption, fontsize=9.5, color=INK, labelpad=6)


def plot_windows(path: str | PathLike) -> None:
    """Draw the four ways to cut a grid, each with the keys of one query, into a PNG at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.3), dpi=200, layout="constrained")
    panels = figure.subplots(1, 4)
    cases = (
        ((12, 12), (5, 6), {"window": 4}, "plain", "window=4\nevery token sees its window"),
        ((12, 12), (11, 8), {"window": 4, "shift": 2}, "shifted", "window=4, shift=2\nno one sees round the edge"),
        ((12, 12), (5, 2), {"window": 4, "halo": 2}, "halo", "window=4, halo=2\nkeys beyond the window"),
        ((11, 11), (9, 8), {"window": 4}, "ragged", "window=4 on 11×11 tokens\nborder windows are smaller"),
    )
    for ax, (shape, query, options, title, caption) in zip(panels, cases, strict=True):
        _panel(ax, window_classes(shape, query, **options), title, caption)
    figure.savefig(path, facecolor="white")
