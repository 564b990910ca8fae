"""Pictures of what a query sees, drawn from the geometry alone: no attention is computed.

matplotlib is imported when a picture is drawn, through its object interface: the caller's backend stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .api import make_axes
from .geometry import Axis, axis_bounds, axis_mask, key_counts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_FRAMES = 12
MAX_DEPTHS = 4
MAX_MATRIX = 512  # longest sequence drawn token by token

# Okabe and Ito's palette: told apart with every common colour-vision deficiency, and in grey by their lightness.
UNSEEN, KEY, SHARED, QUERY = "#f1f3f5", "#56b4e9", "#f0c75e", "#c1440e"
LABELS = {KEY: "key it sees", SHARED: "key, and query with the same window", QUERY: "the query"}
FONT: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "font.family": "DejaVu Sans"}


def _times(values: Sequence[int]) -> str:
    return "×".join(str(v) for v in values)


def _per_axis(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else _times(values)


def _describe(axes: tuple[Axis, ...]) -> str:
    parts = [f"{_times([a.length for a in axes])} tokens", f"window {_per_axis([a.window for a in axes])}"]
    for name in ("stride", "dilation"):
        values = [getattr(axis, name) for axis in axes]
        if any(v != 1 for v in values):
            parts.append(f"{name} {_per_axis(values)}")
    if any(axis.causal for axis in axes):
        names = ("time", "height", "width")[-len(axes) :] if len(axes) > 1 else ("",)
        causal = [name for name, axis in zip(names, axes, strict=True) if axis.causal]
        parts.append("causal" if len(causal) == len(axes) else f"causal in {', '.join(causal)}")
    return ", ".join(parts)


def _check_rank(shape: Sequence[int]) -> None:
    if not 1 <= len(shape) <= 3:
        raise ValueError(f"shape={tuple(shape)} must have 1 to 3 axes")


def _check_query(query: Sequence[int] | int, axes: tuple[Axis, ...]) -> tuple[int, ...]:
    query = (query,) if isinstance(query, int) else tuple(query)
    if len(query) != len(axes) or not all(0 <= q < axis.length for q, axis in zip(query, axes, strict=True)):
        raise ValueError(f"query={query} must name one token of a grid of {_times([a.length for a in axes])}")
    return query


def _seen_on_axis(axis: Axis, query: int) -> tuple[Tensor, Tensor]:
    """Coordinates that the query sees, and queries that have the same window: both bool `[length]`."""
    first, last = axis_bounds(axis)
    seen = torch.zeros(axis.length, dtype=torch.bool)
    seen[int(first[query]) : int(last[query]) + 1 : axis.dilation] = True
    return seen, (first == first[query]) & (last == last[query])


def _classes(axes: tuple[Axis, ...], query: tuple[int, ...]) -> Tensor:
    """Index into (UNSEEN, KEY, SHARED, QUERY) of every token: int64 `[*shape]`."""
    seen, shared = torch.ones((), dtype=torch.bool), torch.ones((), dtype=torch.bool)
    for axis, q in zip(axes, query, strict=True):
        seen_here, shared_here = _seen_on_axis(axis, q)
        seen, shared = seen[..., None] & seen_here, shared[..., None] & shared_here
    classes = seen.long() + (seen & shared).long()
    classes[query] = 3
    return classes


def _draw_grid(ax: Axes, classes: Tensor) -> None:
    """One 2-D panel of token classes: cell borders where they can be told apart, else a marker on the query."""
    from matplotlib.colors import ListedColormap

    rows, columns = classes.shape
    ax.imshow(classes.numpy(), cmap=ListedColormap([UNSEEN, KEY, SHARED, QUERY]), vmin=0, vmax=3, interpolation="none")
    if max(rows, columns) <= 64:
        ax.set_xticks(torch.arange(columns + 1).numpy() - 0.5, minor=True)
        ax.set_yticks(torch.arange(rows + 1).numpy() - 0.5, minor=True)
        ax.grid(which="minor", color="white", linewidth=0.6)
        ax.tick_params(which="minor", length=0)
    for row, column in (classes == 3).nonzero().tolist() if max(rows, columns) > 64 else ():
        style = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.7, "clip_on": False}
        ax.plot(column, row, "o", color=QUERY, **style)
    _tidy(ax)


def _tidy(ax: Axes) -> None:
    ax.tick_params(which="major", length=2, labelsize=7)
    ax.locator_params(nbins=5, integer=True)
    for spine in ax.spines.values():
        spine.set_linewidth(0.6)
        spine.set_color("#868e96")


def _new_figure(
    rows: int, columns: int, panel: tuple[float, float], colorbar: float = 0.0
) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    # 0.6 inch of height is for the title and the legend
    size = (max(columns * panel[0] + colorbar, 4.8), rows * panel[1] + 0.6)
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _legend(figure: Figure, shown: Sequence[str], labels: Mapping[str, str] | None = None) -> None:
    from matplotlib.patches import Patch

    labels = {**LABELS, **(labels or {})}
    handles = [Patch(color=color, label=labels[color]) for color in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)


def _save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", facecolor="white")
    return path


def _panel_size(rows: int, columns: int, width: float) -> tuple[float, float]:
    """Inches of one panel with its labels: tall and wide grids keep square cells, within reason."""
    return width, (width - 0.4) * min(max(rows / columns, 0.3), 2.0) + 0.55


def _plot_1d(axis: Axis, query: int) -> Figure:
    figure, (ax,) = _new_figure(1, 1, (4.8, 4.4))
    if axis.length <= MAX_MATRIX:
        classes = axis_mask(axis).long()
        classes[query] *= 2
        classes[query, query] = 3
        _draw_grid(ax, classes)
    else:  # the band holds every window; at this scale the gaps of a dilated one are below a pixel
        first, last = (bound.numpy() for bound in axis_bounds(axis))
        ax.fill_betweenx(range(axis.length), first, last, color=KEY, linewidth=0)
        ax.plot([first[query], last[query]], [query, query], color=SHARED, linewidth=2)
        ax.plot([query], [query], "s", color=QUERY, markersize=4)
        ax.set(xlim=(0, axis.length), ylim=(axis.length, 0), aspect="equal", facecolor=UNSEEN)
        _tidy(ax)
    ax.set(xlabel="key", ylabel="query")
    keys = int(key_counts(axis)[query])
    ax.set_title(f"query {query} (highlighted row) sees {keys} of {axis.length} keys")
    return figure


def _plot_2d(axes: tuple[Axis, ...], queries: Sequence[tuple[str, tuple[int, ...]]]) -> Figure:
    rows, columns = (axis.length for axis in axes)
    figure, panels = _new_figure(1, len(queries), _panel_size(rows, columns, 4.2 if len(queries) == 1 else 2.6))
    shared = False
    for ax, (name, query) in zip(panels, queries, strict=True):
        classes = _classes(axes, query)
        shared |= bool((classes == 2).any())
        _draw_grid(ax, classes)
        ax.set_title(f"{name} ({query[0]}, {query[1]}): {int((classes > 0).sum())} keys")
        ax.set_xlabel("column")
    panels[0].set_ylabel("row")
    _legend(figure, [KEY, SHARED, QUERY] if shared else [KEY, QUERY])
    return figure


def _pick_frames(axis: Axis, query: int) -> list[int]:
    """All frames of a short clip; of a long one the frames seen, thinned evenly, and the query's."""
    if axis.length <= MAX_FRAMES:
        return list(range(axis.length))
    seen = _seen_on_axis(axis, query)[0].nonzero().flatten().tolist()
    frames = {max(seen[0] - axis.dilation, 0), *seen, min(seen[-1] + axis.dilation, axis.length - 1)}
    if len(frames) > MAX_FRAMES:
        ordered = sorted(frames - {query})
        picks = torch.linspace(0, len(ordered) - 1, MAX_FRAMES - 1).round().long().tolist()
        frames = {query, *(ordered[i] for i in picks)}
    return sorted(frames)


def _plot_3d(axes: tuple[Axis, ...], query: tuple[int, ...]) -> Figure:
    classes = _classes(axes, query)
    frames = _pick_frames(axes[0], query[0])
    columns = len(frames) if len(frames) <= 4 else min(6, -(-len(frames) // 2))
    rows = -(-len(frames) // columns)
    figure, panels = _new_figure(rows, columns, _panel_size(axes[1].length, axes[2].length, 1.75))
    for ax in panels[len(frames) :]:
        ax.set_axis_off()
    for ax, frame in zip(panels, frames, strict=False):
        _draw_grid(ax, classes[frame])
        is_query = frame == query[0]
        ax.set_title(
            f"frame {frame}", color=QUERY if is_query else "black", fontweight="bold" if is_query else "normal"
        )
        ax.locator_params(nbins=4)
    where = ", ".join(str(q) for q in query)
    label = f"the query ({where}), which sees {int((classes > 0).sum())} keys"
    _legend(figure, [KEY, SHARED, QUERY] if bool((classes == 2).any()) else [KEY, QUERY], {QUERY: label})
    return figure


def plot_receptive_field(
    shape: Sequence[int],
    *,
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    query: int | Sequence[int] | None = None,
    path: str | os.PathLike[str],
) -> Path:
    """Draw the keys that a query sees, as a PNG.

    A sequence is drawn as its query-by-key matrix with the query's row highlighted, an image as the grid of tokens, a
    clip as one such grid a frame (at most 12: the frames that the query sees, thinned evenly).

    Args:
        shape: tokens along each of 1 to 3 spatial axes.
        window, stride, dilation, causal: one value, or one per axis; see `na2d`.
        query: coordinate of the query; by default the centre and, for images, an edge and a corner as well.
        path: where the PNG goes; missing folders are made.

    Returns:
        The path written.

    Raises:
        ValueError, TypeError: a neighborhood that `na1d`, `na2d` and `na3d` would refuse, or a query outside the grid.
    """
    from matplotlib import rc_context

    axes = make_axes(shape, window=window, stride=stride, dilation=dilation, causal=causal)
    _check_rank(shape)
    centre = tuple(axis.length // 2 for axis in axes)
    chosen = centre if query is None else _check_query(query, axes)
    with rc_context(FONT):
        if len(axes) == 1:
            figure = _plot_1d(axes[0], chosen[0])
        elif len(axes) == 2:
            examples = [("centre", centre), ("edge", (0, centre[1])), ("corner", (0, 0))]
            figure = _plot_2d(axes, examples if query is None else [("query", chosen)])
        else:
            figure = _plot_3d(axes, chosen)
        figure.suptitle(f"na{len(axes)}d: {_describe(axes)}", fontsize=10, fontweight="bold")
        return _save(figure, path)


def composed_weights(layers: Sequence[tuple[Axis, ...]], query: Sequence[int]) -> list[Tensor]:
    """Share of every input token in one output token, were all attention weights equal, for every depth.

    Args:
        layers: axes of each layer, first layer first; all of one shape.
        query: coordinate of the output token of the last layer.

    Returns:
        one float64 tensor `[*shape]` a depth, each of sum 1: the last layer alone, the last two, ... all of them.
    """
    shares = [torch.zeros(axis.length, dtype=torch.float64) for axis in layers[0]]
    for share, q in zip(shares, query, strict=True):
        share[q] = 1.0
    depths = []
    for axes in reversed(layers):
        for i, axis in enumerate(axes):
            shares[i] = (shares[i] / key_counts(axis)) @ axis_mask(axis).double()
        total = shares[0]
        for share in shares[1:]:
            total = total[..., None] * share
        depths.append(total)
    return depths


def _draw_heat(ax: Axes, share: Tensor):
    """One panel of shares relative to the largest; tokens out of reach are grey."""
    from matplotlib import colormaps

    cells = share[None] if share.dim() == 1 else share  # [rows, columns]
    heat = ax.imshow(
        (cells / cells.max()).masked_fill(cells == 0, float("nan")).numpy(),
        cmap=colormaps["viridis"].with_extremes(bad=UNSEEN),
        vmin=0,
        vmax=1,
        interpolation="none",
        aspect="auto" if share.dim() == 1 else "equal",
    )
    _tidy(ax)
    return heat


def plot_composed_receptive_field(
    shape: Sequence[int],
    layers: Sequence[Mapping],
    *,
    query: int | Sequence[int] | None = None,
    path: str | os.PathLike[str],
) -> Path:
    """Draw how the receptive field of one output token grows through a stack of layers, as a PNG heat map.

    The colour is the share of an input token in the output token were all attention weights equal (attention rollout
    with uniform weights and no skip connections), relative to the largest; a token that no path reaches is grey. At
    most 4 depths are shown, a clip as the frame of the query.

    Args:
        shape: tokens along each of 1 to 3 spatial axes.
        layers: for each layer, first layer first, a mapping of `window` and optionally `stride`, `dilation` and
            `causal`: `[{"window": 7}, {"window": 7, "dilation": 8}]` is a pair of DiNAT's blocks.
        query: coordinate of the output token, by default the centre.
        path: where the PNG goes; missing folders are made.

    Returns:
        The path written.

    Raises:
        ValueError, TypeError: no layers, a neighborhood that the operators would refuse, or a query outside the grid.
    """
    from matplotlib import rc_context

    if not layers:
        raise ValueError("layers must hold at least one layer")
    _check_rank(shape)
    stack = [make_axes(shape, **layer) for layer in layers]
    chosen = _check_query(tuple(n // 2 for n in shape) if query is None else query, stack[0])
    shares = composed_weights(stack, chosen)
    count = min(MAX_DEPTHS, len(shares))
    depths = sorted({round(float(d)) for d in torch.linspace(1, len(shares), count)})
    rows, columns = (1, shape[0]) if len(shape) == 1 else shape[-2:]
    with rc_context(FONT):
        if len(shape) == 1:
            figure, panels = _new_figure(len(depths), 1, (6.4, 0.75))
        else:
            panel = _panel_size(rows, columns, 2.6 if len(depths) > 1 else 4.2)
            figure, panels = _new_figure(1, len(depths), panel, colorbar=0.6)
        heats = []
        for ax, depth in zip(panels, depths, strict=True):
            share = shares[depth - 1]
            reached = float((share > 0).double().mean())
            heats.append(_draw_heat(ax, share[chosen[0]] if share.dim() == 3 else share))
            name = (
                "last layer" if depth == 1 else f"last {depth} layers" if depth < len(shares) else f"all {depth} layers"
            )
            ax.set_title(f"{name}: {100 * reached:.3g} % of tokens")
            if len(shape) == 1:
                ax.set_yticks([])
        figure.colorbar(heats[-1], ax=panels, shrink=0.8, pad=0.02, label="share in the output, largest = 1")
        figure.suptitle(_describe_stack(stack, chosen), fontsize=10, fontweight="bold")
        return _save(figure, path)


def _describe_stack(stack: Sequence[tuple[Axis, ...]], query: tuple[int, ...]) -> str:
    def listed(name: str) -> str:
        values = [_per_axis([getattr(axis, name) for axis in axes]) for axes in stack]
        values = values[:1] if len(set(values)) == 1 else values
        return f"{name} {', '.join(values[:8])}{', …' if len(values) > 8 else ''}"

    where = ", ".join(str(q) for q in query)
    return f"What token ({where}) is made of: {listed('window')}, {listed('dilation')}"
