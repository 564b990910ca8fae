"""One denoising step of VideoDiT, dense attention against sliding 3-D windows and against the blocks of sparse masks.

Windows on a GPU: sizes B and XL, bfloat16, token grids of 480p and 720p clips (21x30x52 and 33x45x80), window
(6, 16, 16) with stride 1 and with the stride of the kernel's tiles; on CPU one layer of B on small grids. Masks, whose
choice of blocks is part of a step: XL on the same grids of a GPU, and two layers of S at 8k and 16k tokens on CPU.

FLOPs are those of the linear layers, counted while they run, and of the visible pairs of attention. `allowed` is the
ratio of FLOPs of dense attention to those of the row; `share` is the speed-up over that ratio.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from foveal.kernels.neighborhood import cost, make_axes
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from ..benchmark import Benchmark, Call, Maker, Metric
from ..figures import in_order
from ..records import Row
from . import masks

COLORS = {
    "dense": "#56789a",
    "window": "#c1440e",
    "window strided": "#f0a35e",
    "vsa": "#3b7d4f",
    "vmoba": "#8fbf6a",
    "radial": "#7a4f9a",
    "psa": "#c99ac0",
}
# method -> its options: at most three tenths of the pairs on the grids below, but for radial attention on few frames;
# those of VSA and PSA are of their published checkpoints
MASKS: dict[str, dict[str, Any]] = {
    "vsa": {"sparsity": 0.9, "block": 4},
    "vmoba": {"topk": 12, "block": (4, 4, 8), "query_block": (2, 4, 8)},
    "radial": {"block": 64, "decay": 0.2},
    "psa": {"ends": {1: 0.05, 2: 0.15, 4: 0.25, 8: 0.5}, "rule": "topk"},
}


@dataclass(frozen=True)
class Case:
    """A model on a grid of tokens; `window` and `stride` are those of its windows, without which it has masks."""

    preset: str
    grid: tuple[int, int, int]
    window: tuple[int, int, int] | None = None
    stride: tuple[int, int, int] | None = None
    layers: int | None = None  # of the preset when None
    dtype: torch.dtype = torch.float32
    kernel = "video_dit"

    @property
    def name(self) -> str:
        layers = "" if self.layers is None else f" {self.layers} layer(s)"
        return f"{self.preset}{layers} {_x(self.grid)} " + ("masks" if self.window is None else f"w{_x(self.window)}")

    @property
    def source(self) -> str:
        return f"VideoDiT-{self.preset.upper()}"

    @property
    def attentions(self) -> dict[str, str | dict]:
        if self.window is None:
            sparse = {"type": "sparse"}
            return {"dense": "dense"} | {
                name: sparse | {"mask": name, "options": options, "flat": name == "psa"}
                for name, options in MASKS.items()
            }
        window = {"type": "window", "window": list(self.window)}
        return {
            "dense": "dense",
            "window": window,
            "window strided": window | {"stride": list(self.stride or (1,) * 3)},
        }

    def model(self, attention: str | dict, device: torch.device):
        from foveal.zoo.video import VideoDiT  # diffusers is needed by this benchmark only

        options = {} if self.layers is None else {"num_layers": self.layers}
        with device:
            model = VideoDiT.from_preset(self.preset, attention=[attention], **options)
        if device.type == "meta":
            return model.eval()
        torch.manual_seed(0)
        for parameter in model.parameters():  # zeros are faster to multiply
            torch.nn.init.normal_(parameter, std=0.02)
        return model.to(device, self.dtype).eval()

    def step(self, attention: str | dict, device: torch.device) -> Call:
        model = self.model(attention, device)
        config: Any = model.config
        size = [n * p for n, p in zip(self.grid, config.patch_size, strict=True)]
        video = torch.randn(1, config.in_channels, *size, device=model.device, dtype=model.dtype)
        timestep = torch.full((1,), 500.0, device=model.device)
        return torch.no_grad()(lambda: model(video, timestep, return_dict=False)[0])


def _x(values: tuple[int, ...]) -> str:
    return "x".join(map(str, values))


class Video(Benchmark):
    name = "video_dit"
    suite = "video"
    title = "One denoising step of VideoDiT"
    our_names = ("window", "window strided", *MASKS)
    modes = ("step",)

    def cases(self, device: torch.device, *, everything: bool = False) -> Iterator[Case]:
        if device.type == "cpu":
            for grid in ((8, 16, 16), (10, 20, 20)):
                yield Case("b", grid, (3, 8, 8), (1, 4, 4), layers=1)
            for grid in ((8, 32, 32), (64, 16, 16)):
                yield Case("s", grid, layers=2)
            return
        grids = (21, 30, 52), (33, 45, 80)
        for preset in ("b", "xl"):
            for grid in grids:
                yield Case(preset, grid, (6, 16, 16), (2, 8, 8), dtype=torch.bfloat16)
        for grid in grids:
            yield Case("xl", grid, dtype=torch.bfloat16)

    def makers(self, case: Case, mode: str, device: torch.device, *, everything: bool = False) -> dict[str, Maker]:
        return {name: partial(case.step, attention, device) for name, attention in case.attentions.items()}

    def flops(self, case: Case) -> dict[str, float]:
        """FLOPs of a step per attention: linear layers as they run, attention by its visible pairs. The choice of
        blocks is not counted."""
        nowhere = torch.device("meta")
        with FlopCounterMode(display=False) as counter:
            case.step("dense", nowhere)()
        linear = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
        found = {}
        for name, attention in case.attentions.items():
            model = case.model(attention, nowhere)
            pattern, config = model.patterns[0], cast(Any, model.config)
            sizes = {"heads": config.num_attention_heads, "head_dim": config.attention_head_dim}
            if pattern.type == "sparse":
                sparse = masks.Case(name, case.grid, **sizes, options=dict(pattern.options))
                each = masks.Masks().work(sparse, "forward").flops
            else:
                options: dict[str, Any] = (
                    {"window": case.grid} if pattern.type == "dense" else pattern.fit(case.grid)[0]
                )
                each = cost.forward_flops(make_axes(case.grid, **options), batch=1, **sizes)
            found[name] = linear + len(model.blocks) * each
        return found

    def derive(self, case: Case, mode: str, measured: Sequence[Metric], device: torch.device) -> Iterator[Metric]:
        """FLOPs, speed-up over dense attention, and the ratio of FLOPs."""
        times = {m.provider: m.p50 for m in measured if m.metric == "time"}
        flops = self.flops(case)
        for name in times:
            yield Metric(name, "flops", "GFLOP", flops[name] / 1e9)
            if "dense" in times:
                allowed, faster = flops["dense"] / flops[name], times["dense"] / times[name]
                yield Metric(name, "speed-up", "x", faster)
                yield Metric(name, "allowed", "x", allowed)
                yield Metric(name, "share", "", faster / allowed)

    def plot(self, rows: Sequence[Row], path: Path) -> None:
        """Time of a step, and speed-up beside the ratio of FLOPs."""
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        names = in_order(r.case for r in rows)
        found = {(r.case, r.provider, r.metric): r for r in rows}
        for metric, axes in (("time", left), ("speed-up", right)):
            for x, name in enumerate(names):
                shown = [p for p in COLORS if (name, p, metric) in found and (metric, p) != ("speed-up", "dense")]
                width = 0.8 / max(len(shown), 1)
                for i, provider in enumerate(shown):
                    row, where = found[name, provider, metric], x + (i + 0.5) * width - 0.4
                    spread = np.array([[row.p50 - row.band[0]], [row.band[1] - row.p50]])
                    axes.bar(where, row.p50, width, color=COLORS[provider], label=provider,
                             yerr=spread if metric == "time" else None, error_kw={"lw": 0.6})  # fmt: skip
                    if metric == "speed-up":
                        allowed = found[name, provider, "allowed"].p50
                        axes.hlines(allowed, where - width / 2, where + width / 2, color="black", label="FLOPs allow")
        left.set_yscale("log")
        left.set(ylabel="ms", title="Time of a step, median and 20th to 80th percentile")
        right.set(ylabel="times faster than dense", title="Speed-up")
        for axes in (left, right):
            axes.title.set_fontsize(10)
            axes.set_xticks(
                range(len(names)),
                [n.replace(" w", "\nwindow ").replace(" masks", "\nmasks") for n in names],
                fontsize=8,
            )
            axes.grid(axis="y", lw=0.3)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlim(-0.6, len(names) - 0.4)
        drawn = [axes.get_legend_handles_labels() for axes in (left, right)]
        legend = dict(
            zip((x for _, labels in drawn for x in labels), (x for bars, _ in drawn for x in bars), strict=True)
        )
        figure.legend(legend.values(), legend.keys(), fontsize=8, frameon=False, ncols=4, loc="outside lower center")
        figure.suptitle(f"{self.title}\n{rows[0].device}", fontsize=11)
        figure.savefig(path, dpi=150)
