"""Pictures of rows: bars per case, and lines over the number of tokens."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from .records import Row

COLORS = {
    "foveal": "#c1440e",
    "foveal compiled": "#f0a35e",
    "dense flash": "#56789a",
    "dense cudnn": "#34495e",
    "dense efficient": "#7f9fbf",
    "dense math": "#a9bdd1",
    "flex": "#8ab17d",
    "natten": "#2a9d8f",
    "unfold": "#b8b8b8",
    "gather": "#b8b8b8",
    "partition": "#b8b8b8",
    "partition SDPA": "#8d8d8d",
    "eager": "#b8b8b8",
    "SDPA twice": "#8d8d8d",
}
OTHER = "#8a6fa8"


def select(rows: Sequence[Row], metric: str, mode: str) -> dict[tuple[str, str], Row]:
    """Rows of a metric and a mode by case and provider."""
    return {(r.case, r.provider): r for r in rows if (r.metric, r.mode) == (metric, mode)}


def in_order(values) -> list:
    return list(dict.fromkeys(values))


def logarithmic(axes: Axes) -> None:
    """A logarithmic axis of values with plain numbers at 1, 2 and 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", labelsize=8)


def bars(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Logarithmic bars of time per case, one panel per mode, with error bars from the 20th to the 80th percentile."""
    modes = in_order(r.mode for r in rows if r.metric == "time")
    names = in_order(r.case for r in rows if r.metric == "time")
    shown = in_order(r.provider for r in rows if r.metric == "time")
    figure = Figure(figsize=(max(7.0, 1.5 + len(names) * max(0.9, 0.17 * len(shown))), 3.9 * len(modes)),
                    layout="constrained")  # fmt: skip
    panels = figure.subplots(len(modes), 1, squeeze=False)[:, 0]
    for axes, mode in zip(panels, modes, strict=True):
        times = select(rows, "time", mode)
        for i, provider in enumerate(shown):
            found = [(x, times[case, provider]) for x, case in enumerate(names) if (case, provider) in times]
            where = [x + (i - (len(shown) - 1) / 2) * 0.84 / len(shown) for x, _ in found]
            axes.bar(
                where,
                [r.p50 for _, r in found],
                0.84 / len(shown),
                yerr=[[r.p50 - r.band[0] for _, r in found], [r.band[1] - r.p50 for _, r in found]],
                label=provider,
                color=COLORS.get(provider, OTHER),
                error_kw={"lw": 0.6},
            )
        logarithmic(axes)
        axes.set(ylabel="ms", title=f"{mode}, median and 20th to 80th percentile")
        axes.title.set_fontsize(10)
        axes.set_xticks(range(len(names)), ["\n".join(wrap(name, 14)) for name in names], fontsize=7)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.grid(axis="y", lw=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, ncols=len(shown), loc="outside lower center")
    figure.suptitle(f"{title}\n{rows[0].device}", fontsize=11)
    figure.savefig(path, dpi=150)


def lines(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Time over tokens, one column per kernel and one row per mode; the legend gives the exponents."""
    modes = in_order(r.mode for r in rows)
    kernels = in_order(r.kernel for r in rows)
    figure = Figure(figsize=(3.1 * len(kernels), 3.1 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), len(kernels), squeeze=False, sharey="row")
    for line, mode in zip(panels, modes, strict=True):
        for axes, kernel in zip(line, kernels, strict=True):
            chosen = [r for r in rows if (r.kernel, r.mode) == (kernel, mode)]
            for provider in in_order(r.provider for r in chosen):
                found = [(tokens_of(r), r.p50) for r in chosen if (r.provider, r.metric) == (provider, "time")]
                powers = [r.p50 for r in chosen if (r.provider, r.metric) == (provider, "exponent")]
                label = f"{provider}: tokens^{powers[-1]:.2f}" if powers else provider
                if found:
                    axes.plot(*zip(*sorted(found), strict=True), "o-", ms=3, label=label,
                                color=COLORS.get(provider, OTHER))  # fmt: skip
            logarithmic(axes)
            counts = sorted({tokens_of(r) for r in chosen if r.metric == "time"})
            axes.set_xscale("log")
            labelled = [n for i, n in enumerate(counts) if not i or n > 1.7 * counts[i - 1]]
            axes.set_xticks(labelled, [f"{n / 1024:.0f}k" for n in labelled], fontsize=8)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_title(f"{kernel}, {mode}", fontsize=9)
            axes.legend(frameon=False, fontsize=7)
            axes.grid(lw=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("ms")
    for axes in panels[-1]:
        axes.set_xlabel("tokens")
    figure.suptitle(f"{title}\n{rows[0].device}", fontsize=11)
    figure.savefig(path, dpi=150)


def tokens_of(row: Row) -> int:
    """Tokens of a case whose name begins with the lengths of its grid."""
    return int(np.prod([int(n) for n in row.case.split()[0].split("x")]))
