"""The pictures of a video run: moving grids of samples, strips of frames, learning curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .plots import FONT, MUTED, TRAIN, VAL, save_figure

INK, PAPER, GAP = (33, 37, 41), (255, 255, 255), 6


def _pixels(videos: Tensor, side: int) -> np.ndarray:
    """`[N, C, T, H, W]` in 0..1 → `[N, T, h, w, 3]` uint8, enlarged by a whole number to at least `side` pixels."""
    scale = max(1, -(-side // max(videos.shape[-2:])))
    frames = videos.float().clamp(0, 1).mul(255).round().byte().cpu().permute(0, 2, 3, 4, 1).numpy()
    if frames.shape[-1] == 1:
        frames = 255 - frames.repeat(3, axis=-1)  # ink on paper
    return frames[..., :3].repeat(scale, axis=2).repeat(scale, axis=3)


def write_grid(
    videos: Tensor, *, captions: Sequence[str], columns: int, path: Path, title: str = "", fps: int = 6, side: int = 64
) -> Path:
    """Writes a looping GIF of a grid of videos.

    Args:
        videos: `[N, C, T, H, W]` in 0..1, row by row; videos of one channel are drawn as ink on paper.
        captions: one for each column, or one for each video.
        columns: of the grid.
        path: where the GIF goes.
        title: above the grid; the page is at least as wide.
        fps: frames a second.
        side: least pixels of the longer side of a video.
    """
    frames = _pixels(videos, side)
    count, length, height, width = frames.shape[:4]
    rows = -(-count // columns)
    header, every = 20, len(captions) > columns
    top = 26 if title else GAP
    cell = height + GAP + (header if every else 0)
    font, grid = ImageFont.load_default(size=12), columns * (width + GAP) - GAP
    inside = max(grid, math.ceil(font.getlength(title)))
    page = Image.new("RGB", (inside + 2 * GAP, top + rows * cell + (0 if every else header)), PAPER)
    draw, left = ImageDraw.Draw(page), GAP + (inside - grid) // 2
    if title:
        draw.text((GAP, GAP), title, fill=INK, font=font)

    def corner(i: int) -> tuple[int, int]:
        row, column = divmod(i, columns)
        return left + column * (width + GAP), top + header + row * cell

    for i, caption in enumerate(captions):
        x, y = corner(i)
        while caption and draw.textlength(caption, font=font) > width:
            caption = caption.rstrip("…")[:-1] + "…"
        draw.text((x + width // 2, y - header // 2), caption, fill=INK, font=font, anchor="mm")
    pages = []
    for t in range(length):
        picture = page.copy()
        for i in range(count):
            x, y = corner(i)
            picture.paste(Image.fromarray(frames[i, t]), (x, y))
            ImageDraw.Draw(picture).rectangle((x - 1, y - 1, x + width, y + height), outline=(222, 226, 230))
        pages.append(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=round(1000 / fps), loop=0)
    return path


def text_width(text: str, size: float, **font: str) -> float:
    """Inches that a line of text takes in a figure at `size` points, as it stands: `$` is no mathematics."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    if not text.strip():
        return 0.0
    prop = FontProperties(family=FONT["font.family"], **font)
    return TextPath((0, 0), text.replace("$", r"\$"), size=size, prop=prop).get_extents().width / 72


def plot_strips(made: Tensor, real: Tensor | None, *, captions: Sequence[str], title: str, path: Path) -> Path:
    """Draws every frame of generated clips, a clip a row, and beside them those of real ones of the same condition.

    Args:
        made, real: `[N, C, T, H, W]` in 0..1.
        captions: N.
        title: of the picture.
        path: where the PNG goes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    groups = [("generated", made)] + ([("held-out", real)] if real is not None else [])
    frames, ratio = made.shape[2], made.shape[4] / made.shape[3]
    names = [f"{name}, frames 1 to {frames}" for name, _ in groups]
    with rc_context(FONT):
        beside = max(text_width(caption, 9) for caption in captions) + 0.1
        strip = max(0.55 * ratio * frames, *(text_width(name, 10) for name in names))
        width = max(beside + len(groups) * strip, text_width(title, 10, weight="bold"))
        figure = Figure(figsize=(width + 0.3, 0.55 * len(made) + 0.7), dpi=160, layout="constrained")
        shares = [beside + strip, *[strip] * (len(groups) - 1)]  # captions stand left of the first
        parts = figure.subfigures(1, len(groups), wspace=0.03, squeeze=False, width_ratios=shares)[0]
        for first, (part, name, (_, videos)) in enumerate(zip(parts, names, groups, strict=True)):
            axes = part.subplots(len(videos), frames, squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.03})
            part.suptitle(name, fontsize=10)
            for row, pixels, caption in zip(axes, _pixels(videos, 1), captions, strict=True):
                for ax, frame in zip(row, pixels, strict=True):
                    ax.imshow(frame, interpolation="nearest")
                    ax.set(xticks=[], yticks=[])
                    ax.spines[:].set(color="#dee2e6", linewidth=0.6)
                if not first:
                    label = {"rotation": 0, "ha": "right", "va": "center", "parse_math": False}
                    row[0].set_ylabel(caption, labelpad=6, **label)
        figure.suptitle(title, fontweight="bold", fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", facecolor="white", bbox_inches="tight", pad_inches=0.08)
        return path


def plot_video_curves(rows: Sequence[dict[str, float]], *, path: Path) -> Path:
    """Draws training and validation loss, the last losses by time, and the learning rate, over optimizer steps.

    Args:
        rows: one dict an epoch with `step`, `train/loss`, `val/loss`, `val/loss_t…`, `lr`; missing values are skipped.
        path: where the PNG goes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    def draw(ax, name: str, **style) -> None:
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            ax.plot(*zip(*points, strict=True), linewidth=1.5, marker="o", markersize=3, **style)

    with rc_context(FONT):
        figure = Figure(figsize=(10, 3.1), dpi=160, layout="constrained")
        loss, by_time, rate = figure.subplots(1, 3)
        draw(loss, "train/loss", color=TRAIN, label="training (raw weights, random times)")
        draw(loss, "val/loss", color=VAL, label="held-out (average, fixed times)")
        loss.set(title="Velocity loss", ylabel="mean squared error", ylim=(0, None), xlabel="step")
        loss.legend(frameon=False)
        last = next((row for row in reversed(rows) if "val/loss" in row), {})
        times = sorted((float(name.split("_t")[1]), value) for name, value in last.items() if "loss_t" in name)
        if times:
            by_time.plot(*zip(*times, strict=True), color=VAL, marker="o", linewidth=1.5)
        by_time.set(title="Last held-out loss by time", xlabel="t (0 data, 1 noise)", xlim=(0, 1), ylim=(0, None))
        draw(rate, "lr", color=MUTED)
        rate.set(title="Learning rate", xlabel="step", ylim=(0, None))
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        for ax in (loss, by_time, rate):
            ax.grid(alpha=0.25, linewidth=0.6)
            ax.spines[["top", "right"]].set_visible(False)
        return save_figure(figure, path)
