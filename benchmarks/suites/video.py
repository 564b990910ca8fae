"""One denoising step of VideoDiT, dense attention against sliding 3-D windows.

On a GPU: sizes B and XL, bfloat16, token grids of 480p and 720p clips (21x30x52 and 33x45x80), window (6, 16, 16) with
stride 1 and with the stride of the kernel's tiles. On CPU: one layer of B on small grids.

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

COLORS = {"dense": "#56789a", "window": "#c1440e", "window strided": "#f0a35e"}


@dataclass(frozen=True)
class Case:
    """A model on a grid of tokens; `window` and `stride` are those of its windows."""

    preset: str
    grid: tuple[int, int, int]
    window: tuple[int, int, int]
    stride: tuple[int, int, int]
    layers: int | None = None  # of the preset when None
    dtype: torch.dtype = torch.float32
    kernel = "video_dit"

    @property
    def name(self) -> str:
        layers = "" if self.layers is None else f" {self.layers} layer(s)"
        return f"{self.preset}{layers} {_x(self.grid)} w{_x(self.window)}"

    @property
    def source(self) -> str:
        return f"VideoDiT-{self.preset.upper()}"

    @property
    def attentions(self) -> dict[str, str | dict]:
        window = {"type": "window", "window": list(self.window)}
        return {"dense": "dense", "window": window, "window strided": window | {"stride": list(self.stride)}}

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
    our_names = ("window", "window strided")
    modes = ("step",)

    def cases(self, device: torch.device, *, everything: bool = False) -> Iterator[Case]:
        if device.type == "cpu":
            for grid in ((8, 16, 16), (10, 20, 20)):
                yield Case("b", grid, (3, 8, 8), (1, 4, 4), layers=1)
            return
        for preset in ("b", "xl"):
            for grid in ((21, 30, 52), (33, 45, 80)):
                yield Case(preset, grid, (6, 16, 16), (2, 8, 8), dtype=torch.bfloat16)

    def makers(self, case: Case, mode: str, device: torch.device, *, everything: bool = False) -> dict[str, Maker]:
        return {name: partial(case.step, attention, device) for name, attention in case.attentions.items()}

    def flops(self, case: Case) -> dict[str, float]:
        """FLOPs of a step per attention: linear layers as they run, attention by its visible pairs."""
        nowhere = torch.device("meta")
        with FlopCounterMode(display=False) as counter:
            case.step("dense", nowhere)()
        linear = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
        found = {}
        for name, attention in case.attentions.items():
            model = case.model(attention, nowhere)
            pattern, config = model.patterns[0], cast(Any, model.config)
            options: dict[str, Any] = {"window": case.grid} if pattern.type == "dense" else pattern.fit(case.grid)[0]
            sizes = {"heads": config.num_attention_heads, "head_dim": config.attention_head_dim}
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
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        names = in_order(r.case for r in rows)
        found = {(r.case, r.provider, r.metric): r for r in rows}
        for i, (provider, color) in enumerate(COLORS.items()):
            timed = [(x, found[n, provider, "time"]) for x, n in enumerate(names) if (n, provider, "time") in found]
            spread = np.array([[r.p50 - r.band[0], r.band[1] - r.p50] for _, r in timed]).T
            where = [x + (i - 1) * 0.27 for x, _ in timed]
            left.bar(where, [r.p50 for _, r in timed], 0.27, color=color, label=provider, yerr=spread,
                     error_kw={"lw": 0.6})  # fmt: skip
            if provider == "dense":
                continue
            faster = [(x, n) for x, n in enumerate(names) if (n, provider, "speed-up") in found]
            where = [x + (i - 1.5) * 0.27 for x, _ in faster]
            right.bar(where, [found[n, provider, "speed-up"].p50 for _, n in faster], 0.27, color=color, label=provider)
            allowed = [found[n, provider, "allowed"].p50 for _, n in faster]
            label = "FLOPs allow" if provider == "window" else None
            right.scatter(where, allowed, marker="_", s=500, color="black", label=label)
        left.set(ylabel="ms", title="Time of a step, median and 20th to 80th percentile")
        right.set(ylabel="times faster than dense", title="Speed-up")
        for axes in (left, right):
            axes.title.set_fontsize(10)
            axes.set_xticks(range(len(names)), [n.replace(" w", "\nwindow ") for n in names], fontsize=8)
            axes.grid(axis="y", lw=0.3)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlim(-0.6, len(names) - 0.4)
        handles, labels = left.get_legend_handles_labels()
        more, named = right.get_legend_handles_labels()
        allowed = [(h, text) for h, text in zip(more, named, strict=True) if text not in labels]
        handles, labels = handles + [h for h, _ in allowed], labels + [text for _, text in allowed]
        figure.legend(handles, labels, fontsize=8, frameon=False, ncols=4, loc="outside lower center")
        figure.suptitle(f"{self.title}\n{rows[0].device}", fontsize=11)
        figure.savefig(path, dpi=150)
