"""One denoising step of VideoDiT, dense attention against sliding 3-D windows: time, FLOPs and memory.

    python benchmarks/video_dit.py                # what this device can run, into benchmarks/results

On a GPU: sizes B and XL, bfloat16, token grids of 480p and 720p clips (21x30x52 and 33x45x80), window (6, 16, 16) with
stride 1 and with the stride of the kernel's tiles. On CPU: one layer of B on small grids. All attentions run in turns.

FLOPs are useful ones: of the linear layers, counted while they run, and of the visible pairs of attention. `allowed` is
the ratio of FLOPs of dense over those of the row; `share` is how much of it the speed-up reaches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from foveal.kernels.neighborhood import cost, make_axes
from foveal.zoo.video import VideoDiT
from harness import extra_bytes, name_of, seconds, write
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

COLORS = {"dense": "#56789a", "window": "#c1440e", "window strided": "#f0a35e"}
console = Console(width=150)


@dataclass(frozen=True)
class Case:
    """A model on a grid of tokens; `window` and `stride` are those of its windows."""

    preset: str
    grid: tuple[int, int, int]
    window: tuple[int, int, int]
    stride: tuple[int, int, int]
    layers: int | None = None  # of the preset when None

    @property
    def name(self) -> str:
        layers = "" if self.layers is None else f" {self.layers} layer(s)"
        return f"{self.preset}{layers} {_x(self.grid)} w{_x(self.window)}"

    @property
    def attentions(self) -> dict[str, str | dict]:
        window = {"type": "window", "window": list(self.window)}
        return {"dense": "dense", "window": window, "window strided": window | {"stride": list(self.stride)}}

    def model(self, attention: str | dict, device: torch.device) -> VideoDiT:
        options = {} if self.layers is None else {"num_layers": self.layers}
        model = VideoDiT.from_preset(self.preset, attention=[attention], **options)
        torch.manual_seed(0)
        for parameter in model.parameters():  # zeros would be quicker to multiply
            torch.nn.init.normal_(parameter, std=0.02)
        return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()

    def step(self, model: VideoDiT) -> Callable[[], torch.Tensor]:
        size = [n * p for n, p in zip(self.grid, model.config.patch_size, strict=True)]
        video = torch.randn(1, model.config.in_channels, *size, device=model.device, dtype=model.dtype)
        timestep = torch.full((1,), 500.0, device=model.device)
        return torch.no_grad()(lambda: model(video, timestep, return_dict=False)[0])

    def flops(self, model: VideoDiT, step: Callable) -> float:
        """Useful FLOPs of a step: linear layers as they run, attention by its visible pairs."""
        with FlopCounterMode(display=False) as counter:
            step()
        linear = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
        pattern = model.patterns[0]
        options = {"window": self.grid} if pattern.type == "dense" else pattern.fit(self.grid)[0]
        sizes = {"heads": model.config.num_attention_heads, "head_dim": model.config.attention_head_dim}
        return linear + len(model.blocks) * cost.forward_flops(make_axes(self.grid, **options), batch=1, **sizes)


def _x(values: tuple[int, ...]) -> str:
    return "x".join(map(str, values))


def cases(device: torch.device) -> list[Case]:
    if device.type == "cuda":
        grids = ((21, 30, 52), (33, 45, 80))
        return [Case(preset, grid, (6, 16, 16), (2, 8, 8)) for preset in ("b", "xl") for grid in grids]
    return [Case("b", grid, (3, 8, 8), (1, 4, 4), layers=1) for grid in ((8, 16, 16), (10, 20, 20))]


def measure(case: Case, device: torch.device, rounds: int) -> list[dict]:
    models = {name: case.model(attention, device) for name, attention in case.attentions.items()}
    steps = {name: case.step(model) for name, model in models.items()}
    flops = {name: case.flops(models[name], step) for name, step in steps.items()}  # warms up, too
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(1e3 * seconds(step, device))
    rows = []
    for name, step in steps.items():
        low, middle, high = np.percentile(times[name], (20, 50, 80))
        allowed, faster = flops["dense"] / flops[name], np.median(times["dense"]) / middle
        row = partial(dict, provider=name, mode="step", case=case.name)
        rows.append(row(metric="time", unit="ms", value=middle, p20=low, p80=high))
        rows.append(row(metric="flops", unit="GFLOP", value=flops[name] / 1e9))
        rows.append(row(metric="memory", unit="MiB", value=extra_bytes(step, device) / 2**20))
        rows.append(row(metric="speed-up", unit="x", value=faster))
        rows.append(row(metric="allowed", unit="x", value=allowed))
        rows.append(row(metric="share", unit="", value=faster / allowed))
    return rows


def print_table(rows: list[dict]) -> None:
    table = Table("case", "attention", "ms", "GFLOP", "MiB", "speed-up", "allowed", "share", title="one denoising step")
    for case, provider in dict.fromkeys((r["case"], r["provider"]) for r in rows):
        found = {r["metric"]: r["value"] for r in rows if (r["case"], r["provider"]) == (case, provider)}
        cells = [f"{found[m]:.1f}" for m in ("time", "flops", "memory")]
        table.add_row(case, provider, *cells, *(f"{found[m]:.2f}" for m in ("speed-up", "allowed", "share")))
    console.print(table)


def plot(rows: list[dict], path: Path, device_name: str) -> None:
    """Time of a step, and the speed-up beside what the FLOPs allow."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(r["case"] for r in rows))
    labels = [name.replace(" w", "\nwindow ") for name in names]
    found = {(r["case"], r["provider"], r["metric"]): r for r in rows}
    for i, (provider, color) in enumerate(COLORS.items()):
        where = np.arange(len(names)) + (i - 1) * 0.27
        timed = [found[name, provider, "time"] for name in names]
        spread = np.array([[r["value"] - r["p20"], r["p80"] - r["value"]] for r in timed]).T
        left.bar(
            where, [r["value"] for r in timed], 0.27, color=color, label=provider, yerr=spread, error_kw={"lw": 0.6}
        )
        if provider == "dense":
            continue
        right.bar(where - 0.135, [found[name, provider, "speed-up"]["value"] for name in names], 0.27, color=color)
        allowed = [found[name, provider, "allowed"]["value"] for name in names]
        right.scatter(where - 0.135, allowed, marker="_", s=500, color="black", label="FLOPs allow" if i == 1 else None)
    left.set(ylabel="ms", title="Time of a step, median and 20th to 80th percentile")
    right.set(ylabel="times faster than dense", title="Speed-up")
    for panel in (left, right):
        panel.set_xticks(range(len(names)), labels, fontsize=8)
        panel.grid(axis="y", lw=0.3)
        panel.set_axisbelow(True)
        panel.legend(frameon=False, fontsize=8)
    figure.suptitle(f"VideoDiT on {device_name}", fontsize=10)
    figure.savefig(path, dpi=150)


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    only: Annotated[str, typer.Option(help="run the cases whose name holds this text")] = "",
    rounds: Annotated[int, typer.Option(help="timed steps of each attention")] = 5,
    results: Annotated[Path, typer.Option(help="folder of the CSV and the picture")] = Path(__file__).parent
    / "results",
) -> None:
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    rows = [row for case in cases(where) if only in case.name for row in measure(case, where, rounds)]
    print_table(rows)
    path = results / f"video_dit_{where.type}.csv"
    write(rows, path, kernel="video_dit", device=where, rounds=rounds)
    plot(rows, path.with_suffix(".png"), name_of(where))
    console.print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
