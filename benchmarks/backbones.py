"""Whole backbones against those people would use instead: images a second and peak memory in inference.

    python benchmarks/backbones.py                          # every model at 224 and 512, into benchmarks/results
    python benchmarks/backbones.py --only litv2 --sizes 224

All models of one size run in turns, round by round, with random weights. Memory is the peak of a call beyond the
parameters and the input. The attention of ours is held to its reference by the tests of each model family, not here.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import foveal.zoo  # noqa: F401  registers the models
import harness
import timm
import torch
import typer
from matplotlib.figure import Figure
from rich.table import Table

OURS = ("natten_dinat_m", "litv2_s", "biformer_t", "agent_swin_t")
PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny")
BATCH = {224: 8, 512: 2}  # images a call


def inference(name: str, size: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """A call of the model on random images; NotImplementedError where it has no such size."""
    model = timm.create_model(
        name, **({} if name == "convnext_tiny" else {"img_size": size} if takes_size(name) else {})
    )
    images = torch.randn(batch(size), 3, size, size, device=device)
    return torch.no_grad()(partial(model.eval().to(device), images))


def takes_size(name: str) -> bool:
    """Whether the model is built for one size: windows or bias tables depend on it."""
    return name.startswith(("swin", "agent"))


def batch(size: int) -> int:
    return BATCH.get(size, max(1, 8 * 224**2 // size**2))


def print_table(rows: list[dict], sizes: list[int]) -> None:
    table = Table("model", *(f"{size}: {what}" for size in sizes for what in ("images/s", "over Swin-T", "MiB/image")))
    found = {(r["case"], r["provider"], r["metric"]): r["value"] for r in rows}
    for name in dict.fromkeys(r["provider"] for r in rows):
        cells = []
        for size in sizes:
            speed, peer = (found.get((str(size), x, "images/s")) for x in (name, PEERS[0]))
            memory = found.get((str(size), name, "memory"))
            cells += [
                f"{speed:.1f}" if speed else "-",
                f"{speed / peer:.2f}x" if speed and peer else "-",
                f"{memory / batch(size):.0f}" if memory else "-",
            ]
        table.add_row(name, *cells)
    harness.console.print(table)


def plot(rows: list[dict], sizes: list[int], path: Path, device_name: str) -> None:
    """Bars of images a second and of memory, a panel a size."""
    figure = Figure(figsize=(10, 3 * len(sizes)), layout="constrained")
    panels = figure.subplots(len(sizes), 2, squeeze=False)
    for line, size in zip(panels, sizes, strict=True):
        for axes, metric, label in zip(line, ("images/s", "memory"), ("images a second", "MiB an image"), strict=True):
            chosen = [r for r in rows if (r["case"], r["metric"]) == (str(size), metric)][::-1]
            values = [r["value"] / (batch(size) if metric == "memory" else 1) for r in chosen]
            names = [r["provider"].removesuffix("_patch4_window7_224") for r in chosen]
            colors = ["#c1440e" if r["provider"] in OURS else "#56789a" for r in chosen]
            bars = axes.barh(names, values, color=colors)
            axes.bar_label(bars, [f"{v:.1f}" if v < 100 else f"{v:.0f}" for v in values], padding=3, fontsize=8)
            axes.set(title=f"{label}, {size}x{size}")
            axes.margins(x=0.12)
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Inference, float32, {device_name}; ours in red")
    figure.savefig(path, dpi=150)


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    only: Annotated[str, typer.Option(help="run the models whose name holds this text")] = "",
    sizes: Annotated[list[int], typer.Option(help="side of the images")] = [224, 512],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="timed calls of each model")] = 7,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves it to torch")] = 0,
    results: Annotated[Path, typer.Option(help="folder of the CSV and the picture")] = Path(__file__).parent
    / "results",
) -> None:
    if threads:
        torch.set_num_threads(threads)
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    rows = []
    for size in sizes:
        made = {name: partial(inference, name, size, where) for name in (*OURS, *PEERS) if only in name}
        for row in harness.measure(made, where, rounds, what=f"{size}x{size}"):
            row |= {"case": str(size), "mode": "inference"}
            rows.append(row)
            if row["metric"] == "time":
                speeds = {
                    x: 1e3 * batch(size) / row[y] for x, y in (("value", "value"), ("p20", "p80"), ("p80", "p20"))
                }
                rows.append(row | speeds | {"metric": "images/s", "unit": "1/s"})
    print_table(rows, sizes)
    path = results / f"backbones_{where.type}.csv"
    harness.write(rows, path, kernel="backbone", device=where, rounds=rounds)
    plot(rows, sizes, path.with_suffix(".png"), harness.name_of(where))
    harness.console.print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
