"""Draws the pictures of the documentation: `python docs/pictures.py` writes `docs/images/*.png`."""

from pathlib import Path

import torch
from foveal.kernels.agent.plot import plot_agent_attention
from foveal.kernels.linear.plot import plot_linear_attention
from foveal.kernels.neighborhood import make_axes
from foveal.kernels.neighborhood.geometry import Axis, axis_bounds, visible_pairs
from foveal.kernels.neighborhood.plot import (
    KEY,
    QUERY,
    UNSEEN,
    composed_weights,
    plot_composed_receptive_field,
    plot_receptive_field,
)
from foveal.kernels.neighborhood.shards import make_shards, split_evenly
from foveal.kernels.neighborhood.simulator import rank_tiles
from matplotlib import colormaps, rc_context
from matplotlib.colors import LightSource, ListedColormap
from matplotlib.figure import Figure
from torch.nn.functional import adaptive_avg_pool2d, interpolate

IMAGES = Path(__file__).parent / "images"
SECOND, THIRD = "#009e73", "#a45ea5"  # two more of Okabe and Ito's colours
INK = "#343a40"


def seen(shape, query, **options) -> torch.Tensor:
    """Tokens visible to a query: bool `[*shape]`."""
    tokens = torch.ones((), dtype=torch.bool)
    for axis, q in zip(make_axes(shape, **options), query, strict=True):
        first, last = (int(bound[q]) for bound in axis_bounds(axis))
        line = torch.zeros(axis.length, dtype=torch.bool)
        line[first : last + 1 : axis.dilation] = True
        tokens = tokens[..., None] & line
    return tokens


def grid(ax, classes: torch.Tensor, colors: list[str], title: str, caption: str) -> None:
    ax.imshow(classes.numpy(), cmap=ListedColormap(colors), vmin=0, vmax=len(colors) - 1, interpolation="none")
    ax.set(xticks=[], yticks=[])
    edges = torch.arange(classes.shape[0] + 1).numpy() - 0.5
    ax.set_xticks(edges, minor=True)
    ax.set_yticks(edges, minor=True)
    ax.grid(which="minor", color="white", linewidth=0.7)
    bare(ax, title, caption)


def bare(ax, title: str, caption: str) -> None:
    ax.tick_params(which="both", length=0, labelleft=False, labelbottom=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(title, fontsize=11, fontweight="bold", color=INK, pad=8)
    ax.set_xlabel(caption, fontsize=9.5, color=INK, labelpad=6)


def clip(ax, title: str, caption: str) -> None:
    """A clip as a box of tokens, and in it the keys of one query, causal in time."""
    shape, query = (8, 12, 12), (5, 6, 6)
    window = seen(shape, query, window=(4, 5, 5), causal=(True, False, False))
    # time runs to the right, rows downwards: [T, H, W] is drawn as x, -z, y
    cells = window.permute(0, 2, 1).flip(2).numpy()
    colors = torch.empty(cells.shape, dtype=torch.int8).numpy().astype(object)
    colors[:] = KEY
    colors[query[0], query[2], shape[1] - 1 - query[1]] = QUERY
    light = LightSource(azdeg=120, altdeg=35)
    ax.voxels(cells, facecolors=colors, edgecolor="white", linewidth=0.4, lightsource=light)
    t, h, w = shape
    for frame in range(t + 1):  # outlines of the frames
        ax.plot([frame] * 5, [0, w, w, 0, 0], [0, 0, h, h, 0], color="#adb5bd", linewidth=0.6)
    for y, z in ((0, 0), (w, 0), (0, h), (w, h)):
        ax.plot([0, t], [y, y], [z, z], color="#adb5bd", linewidth=0.6)
    ax.set_box_aspect((t * 1.5, w, h), zoom=1.22)
    ax.view_init(elev=18, azim=-58)
    ax.set_axis_off()
    ax.set_title(title, fontsize=11, fontweight="bold", color=INK, pad=8)
    ax.text2D(0.5, -0.045, caption, transform=ax.transAxes, fontsize=9.5, color=INK, ha="center", va="top")


def hero(path: Path) -> None:
    """The picture of the README: four neighborhoods above, what they compose to below."""
    figure = Figure(figsize=(10, 6.5), dpi=200)
    shape = (21, 21)
    queries = {(10, 10): KEY, (0, 17): SECOND, (20, 2): THIRD}

    def panel(row: int, column: int, **options):
        return figure.add_axes((0.018 + 0.248 * column, 0.575 - 0.51 * row, 0.22, 0.34), **options)

    classes = torch.zeros(shape, dtype=torch.int64)
    for number, query in enumerate(queries):
        classes[seen(shape, query, window=7)] = number + 1
        classes[query] = 4
    colors = [UNSEEN, *queries.values(), QUERY]
    grid(panel(0, 0), classes, colors, "neighborhood", "window=7\nshifts at borders, never shrinks")

    classes = seen(shape, (10, 10), window=7, dilation=3).long()
    classes[10, 10] = 2
    grid(panel(0, 1), classes, [UNSEEN, KEY, QUERY], "dilated", "window=7, dilation=3\nas many keys, spread wide")

    classes = seen(shape, (10, 10), window=9, stride=3).long()
    classes[9:12, 9:12] = 2
    grid(panel(0, 2), classes, [UNSEEN, KEY, QUERY], "strided", "window=9, stride=3\nneighbours share a window")

    clip(panel(0, 3, projection="3d"), "video", "window=(4, 5, 5)\ncausal in time")

    stack = [make_axes((56, 56), window=7, dilation=d) for d in (8, 1, 8, 1)]
    captions = ["the last layer", "two layers", "three layers", "four layers"]
    for i, (share, caption) in enumerate(zip(composed_weights(stack, (28, 28)), captions, strict=True)):
        ax = panel(1, i)
        cells = (share / share.max()).masked_fill(share == 0, float("nan"))
        ax.imshow(cells.numpy(), cmap=colormaps["viridis"].with_extremes(bad=UNSEEN), vmin=0, vmax=1)
        bare(ax, "", f"{caption}: {100 * float((share > 0).double().mean()):.3g} %")
    text = "how much of 56×56 tokens one output sees: window 7, dilations 8, 1, 8, 1"
    figure.text(0.5, 0.43, text, ha="center", fontsize=11, fontweight="bold", color=INK)
    figure.savefig(path, facecolor="white")


def tile_bounds(path: Path) -> None:
    """Draw the share of the possible speed-up that tiles keep: speed-up bound over FLOP bound, by window."""
    figure = Figure(figsize=(7.2, 3.4), dpi=200, layout="constrained")
    for ax, (shape, windows) in zip(
        figure.subplots(1, 2),
        [((256, 256), range(8, 129, 8)), ((30, 48, 80), range(6, 31, 2))],
        strict=True,
    ):
        stacks = [make_axes(shape, window=tuple(min(w, n) for n in shape)) for w in windows]
        tokens = torch.tensor(shape).prod().item()
        share = [visible_pairs(axes) / tokens**2 for axes in stacks]
        ax.plot(share, [1 / s for s in share], color=INK, linestyle="--", linewidth=1.2, label="FLOPs alone")
        for aligned, color, marker, label in (
            (False, "#0072b2", "o", "best tiles, start at the first visible key"),
            (True, QUERY, "s", "best tiles, start at a multiple of the tile"),
        ):
            best = [rank_tiles(axes, row_tokens=128, column_tokens=64, aligned=aligned)[0] for axes in stacks]
            ax.plot(share, [t.speedup_bound for t in best], color=color, marker=marker, markersize=3, label=label)
        ax.set(xscale="log", yscale="log", xlabel="share of pairs that count", ylabel="speed-up over dense")
        ax.set_title("×".join(map(str, shape)) + " tokens", fontsize=9, fontweight="bold")
        ax.grid(which="both", color="#e9ecef", linewidth=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=7.5, loc="lower left")
    figure.savefig(path, facecolor="white")


def sharded(path: Path) -> None:
    """Draw the frames of a clip that a rank owns and the frames that it fetches."""
    figure = Figure(figsize=(8, 2.95), dpi=200, layout="constrained")
    panels = (
        (4, 0, {}, "first of 4 ranks", "window=9"),
        (4, 1, {}, "second of 4 ranks", "window=9"),
        (8, 3, {}, "fourth of 8 ranks", "window=9"),
        (4, 1, {"stride": 6}, "second of 4 ranks", "window=9, stride=6"),
    )
    for ax, (ranks, rank, options, title, caption) in zip(figure.subplots(1, 4), panels, strict=True):
        axis, lengths = Axis(24, 9, **options), split_evenly(24, ranks)
        shard = make_shards(axis, lengths)[rank]
        classes, end = torch.zeros(24, 20, dtype=torch.int64), 0
        for other, length in enumerate(lengths):
            count = length if other == rank else shard.receive[other]
            first = end if other >= rank else end + length - count  # what it needs lies at the near end of a piece
            classes[first : first + count] = 1 + (other == rank)
            end += length
            if other:
                ax.plot((-1.8, 19.5), (end - length - 0.5,) * 2, color=INK, linewidth=1, clip_on=False)
            ax.text(-1.2, end - length / 2 - 0.5, str(other), ha="center", va="center", fontsize=7.5, color=INK)
        caption = f"{caption}\nholds {lengths[rank]} frames, fetches {sum(shard.receive)}"
        grid(ax, classes, [UNSEEN, KEY, QUERY], title, caption)
        ax.set_xlim(-0.5, 19.5)
    figure.axes[0].set_ylabel("24 frames, split over ranks", fontsize=9.5, color=INK, labelpad=16)
    figure.savefig(path, facecolor="white")


def discs(size: int = 48) -> torch.Tensor:
    """Features `[size, size, 16]` of a picture: discs of two kinds on a ground, none of them quite even."""
    generator = torch.Generator().manual_seed(4)
    y, x = torch.meshgrid(*[torch.arange(size) + 0.5] * 2, indexing="ij")
    kinds = torch.zeros(size, size, dtype=torch.int64)
    for row, column, radius, kind in ((13, 13, 9, 1), (33, 35, 10, 1), (35, 12, 7, 2)):
        kinds[(y - row) ** 2 + (x - column) ** 2 < radius**2] = kind
    features = torch.randn(3, 16, generator=generator)[kinds]
    uneven = interpolate(torch.randn(1, 16, 12, 12, generator=generator), (size, size), mode="bicubic")[0]
    return 1.3 * features + 0.65 * uneven.permute(1, 2, 0)


def agents(path: Path) -> None:
    """Agent attention on features that are queries and keys alike, with 7x7 agents pooled from them."""
    features = discs()
    pooled = adaptive_avg_pool2d(features.permute(2, 0, 1), 7).flatten(1).mT
    plot_agent_attention(features, features, pooled, token=(14, 12), path=path)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with rc_context({"font.size": 8, "font.family": "DejaVu Sans", "axes.edgecolor": "#868e96"}):
        hero(IMAGES / "hero.png")
        tile_bounds(IMAGES / "tile_bounds.png")
        sharded(IMAGES / "sharded.png")
    agents(IMAGES / "agents.png")
    plot_linear_attention(discs(), discs(), token=(14, 12), path=IMAGES / "linear.png")
    plot_receptive_field((21, 21), window=7, path=IMAGES / "window.png")
    plot_receptive_field((27, 27), window=7, dilation=3, path=IMAGES / "dilation.png")
    plot_receptive_field((21, 21), window=9, stride=3, path=IMAGES / "stride.png")
    plot_receptive_field((21, 21), window=7, causal=(True, False), path=IMAGES / "causal.png")
    plot_receptive_field((32,), window=9, stride=4, causal=True, path=IMAGES / "sequence.png")
    plot_receptive_field((8, 14, 14), window=(3, 7, 7), path=IMAGES / "clip.png")
    layers = [{"window": 7, "dilation": d} for d in (8, 1, 8, 1)]
    plot_composed_receptive_field((56, 56), layers, path=IMAGES / "composed.png")


if __name__ == "__main__":
    main()
