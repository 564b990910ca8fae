"""The pictures of a training run. matplotlib is imported when one is drawn, and the caller's backend is left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.neighborhood import NeighborhoodAttention2d

# names of users are no mathematics: a dollar sign in them stays one
FONT = {"font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "font.family": "DejaVu Sans"} | {
    "text.parse_math": False
}
CELL, WIDEST_CELL = 0.95, 1.5  # inches of an image among predictions; the more, the longer the names of classes
# Okabe and Ito's palette, which colour-blind readers can tell apart
TRAIN, VAL, WRONG, MUTED = "#0072b2", "#d55e00", "#c1440e", "#868e96"


def palette(count: int) -> list[tuple[int, int, int]]:
    """Colours of classes as PASCAL VOC numbers them: black, then the bits of the label spread over red, green, blue."""
    colours = []
    for label in range(count):
        channels = [sum((label >> (3 * bit + i) & 1) << (7 - bit) for bit in range(3)) for i in range(3)]
        colours.append((channels[0], channels[1], channels[2]))
    return colours


def save_figure(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", facecolor="white")
    return path


LONGEST = 60  # characters of a job's name in a picture; longer ones leave no room for the points


@dataclass(frozen=True)
class Curve:
    """A quantity of validation that is better the larger it is, beside the loss.

    Attributes:
        name: of the metric.
        title, label: of its panel and axis.
        percent: it is shown as such.
        loss: title of the loss, which is in nats unless it is just that.
    """

    name: str
    title: str
    label: str
    percent: bool = True
    loss: str = "Loss"

    def value(self, x: float) -> str:
        return f"{100 * x:.2f} %" if self.percent else f"{x:.4g}"


ACCURACY = Curve("val/acc1", "Validation accuracy", "top-1", loss="Cross-entropy")


def plot_curves(rows: Sequence[dict[str, float]], *, path: Path, curve: Curve = ACCURACY) -> Path:
    """Draws loss, a metric of validation and learning rate over the epochs.

    Args:
        rows: one dict an epoch with `epoch`, `train/loss`, `val/loss`, the metric, `lr`; missing values are skipped.
        path: where the PNG goes.
        curve: the metric.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, PercentFormatter

    def draw(ax, name: str, **style) -> None:
        points = [(row["epoch"] + 1, row[name]) for row in rows if name in row]
        if points:
            ax.plot(*zip(*points, strict=True), linewidth=1.5, marker="o" if len(points) == 1 else "", **style)

    with rc_context(FONT):
        figure = Figure(figsize=(10, 3.1), dpi=160, layout="constrained")
        losses, accuracy, rate = figure.subplots(1, 3)
        draw(losses, "train/loss", color=TRAIN, label="training (augmented)")
        draw(losses, "val/loss", color=VAL, label="validation")
        losses.set(title=curve.loss, ylabel="" if curve.loss == "Loss" else "nats", yscale="log")
        losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        losses.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        losses.yaxis.set_minor_formatter(NullFormatter())
        losses.legend(frameon=False)
        draw(accuracy, curve.name, color=VAL)
        accuracy.set(title=curve.title, ylabel=curve.label)
        if curve.percent:
            accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
        _mark_best(accuracy, rows, curve)
        draw(rate, "lr", color=MUTED)
        rate.set(title="Learning rate at the end of the epoch", ylim=(0, None))
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        for ax in (losses, accuracy, rate):
            ax.set_xlabel("epoch")
            ax.grid(alpha=0.25, linewidth=0.6)
            ax.spines[["top", "right"]].set_visible(False)
        return save_figure(figure, path)


def _mark_best(ax, rows: Sequence[dict[str, float]], curve: Curve) -> None:
    validated = [row for row in rows if curve.name in row]
    if validated:
        best = max(validated, key=lambda row: row[curve.name])
        ax.plot(best["epoch"] + 1, best[curve.name], "o", color=VAL, markersize=5)
        text = f"best {curve.value(best[curve.name])}, epoch {int(best['epoch']) + 1}"
        ax.text(0.97, 0.05, text, transform=ax.transAxes, ha="right", color=VAL)


def _inches(text: str, *, size: float, bold: bool) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    prop = FontProperties(family=FONT["font.family"], weight="bold" if bold else "normal")
    return TextPath((0, 0), text, size=size, prop=prop).get_extents().width / 72 if text.strip() else 0.0


def _wrapped(text: str, most: float, *, size: float, bold: bool, lines: int = 2) -> list[str]:
    """At most so many lines of at most so many inches; what does not fit is left out for an ellipsis."""

    def fits(line: str) -> bool:
        return _inches(line, size=size, bold=bold) <= most

    made = [""]
    for word in text.split():
        longer = f"{made[-1]} {word}".strip()
        if fits(longer):
            made[-1] = longer
        else:
            made = [*made, word] if made[-1] else [word]
    kept = made[:lines]
    if len(made) > lines:
        kept[-1] += "…"
    for i, line in enumerate(kept):
        while not fits(kept[i]):
            line = line[:-1].removesuffix("…")
            kept[i] = f"{line}…"
    return kept


def _titles(
    targets: Sequence[int], predictions: Sequence[int], class_names: Sequence[str]
) -> tuple[list[str], float, float]:
    """Titles of predictions, the size of their letters in points, and the inches of a cell that has room for each."""
    names = [" ".join(name.split()) for name in class_names]
    pairs = [(names[target], names[guess]) for target, guess in zip(targets, predictions, strict=True)]
    short = [guess if target == guess else f"{guess}, is {target}" for target, guess in pairs]
    if all(_inches(text, size=10, bold=True) <= CELL - 0.1 for text in set(short)):
        return short, 10, CELL
    room = WIDEST_CELL - 0.15
    made = {
        (target, guess): _wrapped(guess, room, size=8, bold=target != guess)
        + (_wrapped(f"is {target}", room, size=8, bold=True) if target != guess else [])
        for target, guess in set(pairs)
    }
    widest = max(_inches(line, size=8, bold=True) for lines in made.values() for line in lines)
    return ["\n".join(made[pair]) for pair in pairs], 8, max(CELL, widest + 0.15)


def plot_predictions(
    images: Tensor,
    *,
    targets: Sequence[int],
    predictions: Sequence[int],
    class_names: Sequence[str],
    accuracy: float,
    path: Path,
) -> Path:
    """Draws images with the predicted class; mistakes are framed and say what was right.

    Args:
        images: `[N, C, H, W]` in 0..1 with 1 or 3 channels.
        targets, predictions: N class numbers.
        class_names: by class number.
        accuracy: of the whole test set, 0 to 1, for the title.
        path: where the PNG goes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = min(10, len(images))
    rows = -(-len(images) // columns)
    wrong = sum(target != guess for target, guess in zip(targets, predictions, strict=True))
    images = images.cpu()
    with rc_context(FONT):
        titles, size, cell = _titles(targets, predictions, class_names)
        lines = 1 + max(title.count("\n") for title in titles)
        height = rows * (cell + 0.08 + lines * 0.015 * size) + 0.5
        figure = Figure(figsize=(max(columns * cell, 4.5), height), dpi=160, layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax in axes:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for ax, image, target, guess, title in zip(axes, images, targets, predictions, titles, strict=False):
            ax.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            right = target == guess
            weight = "normal" if right else "bold"
            ax.set_title(title, color="black" if right else WRONG, fontweight=weight, fontsize=size, pad=3)
            ax.spines[:].set(visible=True, color="#dee2e6" if right else WRONG, linewidth=0.6 if right else 2.0)
        shown = "no mistakes among them" if not wrong else f"{wrong} mistake{'s' * (wrong > 1)} first"
        figure.suptitle(f"Test accuracy {100 * accuracy:.2f} %; {len(images)} test images, {shown}", fontweight="bold")
        return save_figure(figure, path)


def plot_sheet(images: Tensor, *, titles: Sequence[str], title: str, path: Path) -> Path:
    """Draws a contact sheet: images in rows of at most ten, each under its title.

    Args:
        images: `[N, C, H, W]` in 0..1 with 1 or 3 channels.
        titles: N.
        title: of the sheet; "" for none.
        path: where the PNG goes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = min(10, len(images))
    rows = -(-len(images) // columns)
    room = WIDEST_CELL - 0.15
    with rc_context(FONT):
        wrapped = [_wrapped(" ".join(text.split()), room, size=8, bold=False, lines=3) for text in titles]
        widest = max(_inches(line, size=8, bold=False) for lines in wrapped for line in lines)
        cell, lines = max(CELL, widest + 0.15), max(map(len, wrapped))
        height = rows * (cell + 0.08 + lines * 0.12) + (0.4 if title else 0.1)
        figure = Figure(figsize=(max(columns * cell, 3.0), height), dpi=160, layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax in axes:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for ax, image, lines in zip(axes, images, wrapped, strict=False):
            ax.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            ax.set_title("\n".join(lines), fontsize=8, pad=3)
            ax.spines[:].set(visible=True, color="#dee2e6", linewidth=0.6)
        if title:
            figure.suptitle(title, fontweight="bold")
        return save_figure(figure, path)


@torch.no_grad()
def first_stage(model: nn.Module, image: Tensor) -> tuple[list[int], list[dict[str, Any]]] | None:
    """Grid and neighborhoods of a model's first stage, as `plot_composed_receptive_field` takes them.

    Args:
        model: any module; its `NeighborhoodAttention2d` layers are listed in the order in which they run, as long as
            the grid is that of the first.
        image: `[1, C, H, W]`, an input of the size to look at.

    Returns:
        None if the model has no such layer.
    """
    seen: list[tuple[tuple[int, int], NeighborhoodAttention2d]] = []
    layers = [module for module in model.modules() if isinstance(module, NeighborhoodAttention2d)]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: seen.append((tuple(args[0].shape[1:3]), layer)))
        for layer in layers
    ]
    try:
        if layers:
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        return None
    shape, first = seen[0]
    stage = [layer for other, layer in seen if other == shape]
    grid = [max(n, w * d) for n, w, d in zip(shape, first.window, first.dilation, strict=True)]  # with its padding
    names = ("window", "stride", "dilation", "causal")
    return grid, [{name: getattr(layer, name) for name in names} for layer in stage]


def shorten(name: str, most: int) -> str:
    """A name of at most so many characters, without its end."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def plot_comparison(names: Sequence[str], values: Sequence[float], *, metric: str, mode: str, path: Path) -> Path:
    """Draws one dot per job of a sweep, best first, on an axis that shows their differences.

    Args:
        names, values: of the jobs.
        metric: what the values are.
        mode: "max" or "min", the better direction.
        path: where the PNG goes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(FONT):
        figure = Figure(figsize=(8, 0.32 * len(names) + 1.1), dpi=160, layout="constrained")
        ax = figure.subplots()
        ax.plot(values, range(len(values)), "o", color=TRAIN, markersize=7)
        for row, value in enumerate(values):
            ax.annotate(
                f"{value:.4g}", (value, row), xytext=(7, 0), textcoords="offset points", va="center", color=MUTED
            )
        ax.set(xlabel=f"{metric} ({'more' if mode == 'max' else 'less'} is better)", ylim=(len(values) - 0.5, -0.5))
        ax.set_yticks(range(len(names)), [shorten(name, LONGEST) for name in names])
        ax.margins(x=0.15)
        ax.grid(axis="x", alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        return save_figure(figure, path)
