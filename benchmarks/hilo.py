"""HiLo against spatial-reduction attention and local windows, at LITv2's setting: time and peak memory, inference.

    python benchmarks/hilo.py --threads 1             # into benchmarks/results
    python benchmarks/hilo.py --threads 1 --only 14x14 --rounds 5

Whole layers with their projections: ours with alpha 0.9 and 2x2 windows, timm's PVT v2 attention with reduction 2, and
timm's Swin attention on 7x7 windows with position bias, all with 384 channels and 12 heads: stage 3 of LITv2-S, 14x14
at 224 pixels. They run in turns, round by round. The paper (arXiv:2205.13213, abstract) reports HiLo on CPU 1.4 times
faster than the first and 1.6 times faster than the second; its baselines had no fused attention, ours have. HiLo is
compared with its definition by its tests, not here.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import harness
import torch
import typer
from foveal.layers import HiLo
from matplotlib.figure import Figure
from rich.table import Table
from timm.models.pvt_v2 import Attention as SpatialReduction
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional as F

DIM, HEADS, WINDOW = 384, 12, 7
CASES = [(1, 14), (8, 14), (1, 28), (1, 64)]  # images, side of the map
PAPER = {"spatial reduction": 1.4, "local windows": 1.6}
COLORS = {"HiLo": "#c1440e", "spatial reduction": "#56789a", "local windows": "#b8b8b8"}


class LocalWindows(nn.Module):
    """Swin's attention on a map, without a shift; zeros complete the windows."""

    def __init__(self):
        super().__init__()
        self.attn = WindowAttention(DIM, HEADS, window_size=WINDOW)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        padded = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW)) if height % WINDOW or width % WINDOW else x
        windows = window_partition(padded, (WINDOW, WINDOW)).flatten(1, 2)  # [B * windows, tokens, C]
        out = self.attn(windows).unflatten(1, (WINDOW, WINDOW))
        return window_reverse(out, (WINDOW, WINDOW), *padded.shape[1:3])[:, :height, :width]


class Reduced(nn.Module):
    """PVT's attention to a map of half the size, from a strided convolution."""

    def __init__(self):
        super().__init__()
        self.attn = SpatialReduction(DIM, HEADS, sr_ratio=2, linear_attn=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x.flatten(1, 2), x.shape[1:3]).unflatten(1, x.shape[1:3])


def call(make: Callable[[], nn.Module], x: Tensor) -> Callable[[], Tensor]:
    return torch.no_grad()(partial(make().eval().to(x.device), x))


def case_name(images: int, side: int) -> str:
    return f"{side}x{side}" + (f" x {images} images" if images > 1 else "")


def speedups(rows: list[dict]) -> dict[tuple[str, str], float]:
    """By case and provider, how many times longer than HiLo it takes."""
    times = {(r["case"], r["provider"]): r["value"] for r in rows if r["metric"] == "time"}
    return {(case, name): value / times[case, "HiLo"] for (case, name), value in times.items() if name != "HiLo"}


def print_table(rows: list[dict]) -> None:
    found = {(r["case"], r["provider"], r["metric"]): r["value"] for r in rows}
    table = Table("map", "HiLo, ms", *(f"{name} (paper {value}x)" for name, value in PAPER.items()), "HiLo, MiB")
    for case in dict.fromkeys(r["case"] for r in rows):
        cells = [f"{found[case, name, 'time']:.2f} ({speedups(rows)[case, name]:.2f}x)" for name in PAPER]
        table.add_row(case, f"{found[case, 'HiLo', 'time']:.2f}", *cells, f"{found[case, 'HiLo', 'memory']:.1f}")
    harness.console.print(table)


def plot(rows: list[dict], path: Path, device: torch.device) -> None:
    """Bars of time over HiLo's, a group a map, with the paper's ratios as lines."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    ratios = speedups(rows)
    cases = list(dict.fromkeys(r["case"] for r in rows))
    for i, (name, claimed) in enumerate(PAPER.items()):
        where = [x + (i - 0.5) * 0.38 for x in range(len(cases))]
        bars = axes.bar(where, [ratios[case, name] for case in cases], 0.36, label=name, color=COLORS[name])
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
        label = f"{name} in the paper, {claimed}"
        axes.axhline(claimed, color=COLORS[name], ls="--", lw=1, label=label)
    axes.axhline(1, color=COLORS["HiLo"], lw=1.5, label="HiLo")
    axes.set_xticks(range(len(cases)), cases)
    axes.set(
        ylabel="time over HiLo's, median", title=f"Attention layers of LITv2-S, stage 3, on\n{harness.name_of(device)}"
    )
    axes.margins(y=0.15)
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.savefig(path, dpi=150)


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    only: Annotated[str, typer.Option(help="run the cases whose name holds this text")] = "",
    rounds: Annotated[int, typer.Option(help="timed calls of each provider")] = 51,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves it to torch")] = 0,
    results: Annotated[Path, typer.Option(help="folder of the CSV and the picture")] = Path(__file__).parent
    / "results",
) -> None:
    if threads:
        torch.set_num_threads(threads)
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    providers = {
        "HiLo": partial(HiLo, DIM, num_heads=HEADS, window=2, alpha=0.9),
        "spatial reduction": Reduced,
        "local windows": LocalWindows,
    }
    rows = []
    for images, side in CASES:
        case = case_name(images, side)
        if only not in case:
            continue
        x = torch.randn(images, side, side, DIM, device=where)
        made: dict[str, Callable[[], Callable[[], object]]] = {
            name: partial(call, make, x) for name, make in providers.items()
        }
        measured = harness.measure(made, where, rounds, what=case)
        rows += [row | {"case": case, "mode": "forward"} for row in measured]
    print_table(rows)
    path = results / f"hilo_{where.type}.csv"
    harness.write(rows, path, kernel="hilo", device=where, rounds=rounds)
    plot(rows, path.with_suffix(".png"), where)
    harness.console.print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
