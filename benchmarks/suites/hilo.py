"""HiLo against spatial-reduction attention and local windows, at LITv2's setting.

Whole layers with their projections: ours with alpha 0.9 and 2x2 windows, timm's PVT v2 attention with reduction 2, and
timm's Swin attention on 7x7 windows with position bias, all with 384 channels and 12 heads: stage 3 of LITv2-S, 14x14
at 224 pixels. The paper (arXiv:2205.13213, abstract) reports HiLo on CPU 1.4 times faster than the first and 1.6 times
faster than the second; its baselines had no fused attention. timm's have, and run again without, as the paper's did.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from foveal.layers import HiLo
from matplotlib.figure import Figure
from timm.models.pvt_v2 import Attention as SpatialReduction
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.operator_matrix import as_leaves, errors, gradients

from ..benchmark import Benchmark, Call, Maker, refuse_wrong
from ..figures import in_order, select
from ..records import Row

DIM, HEADS, WINDOW = 384, 12, 7
PAPER = {"spatial reduction": 1.4, "local windows": 1.6}
COLORS = {"HiLo": "#c1440e", "spatial reduction": "#56789a", "local windows": "#8ab17d"}
UNFUSED = ", unfused"


@dataclass(frozen=True)
class Case:
    images: int
    side: int
    dtype: torch.dtype = torch.float32
    kernel = "hilo"
    source = "LITv2-S stage 3"

    @property
    def name(self) -> str:
        return f"{self.side}x{self.side}" + (f" x {self.images} images" if self.images > 1 else "")


class LocalWindows(nn.Module):
    """Swin's attention on a map, without shift; the map is zero-padded to whole windows."""

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
    """PVT's attention to keys of half the resolution, from a strided convolution."""

    def __init__(self):
        super().__init__()
        self.attn = SpatialReduction(DIM, HEADS, sr_ratio=2, linear_attn=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x.flatten(1, 2), x.shape[1:3]).unflatten(1, x.shape[1:3])


def unfused(make: Callable[[], nn.Module]) -> nn.Module:
    """Layer with eager attention: two products and a softmax."""
    layer = make()
    layer.attn.fused_attn = False
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "HiLo": partial(HiLo, DIM, num_heads=HEADS, window=2, alpha=0.9),
    "spatial reduction": Reduced,
    "local windows": LocalWindows,
    "spatial reduction" + UNFUSED: partial(unfused, Reduced),
    "local windows" + UNFUSED: partial(unfused, LocalWindows),
}


class HiLoLayer(Benchmark):
    name = "hilo"
    suite = "kernels"
    title = "Attention layers of LITv2-S, stage 3"
    our_names = ("HiLo",)

    def cases(self, device: torch.device, *, everything: bool = False) -> Iterator[Case]:
        for images, side in ((1, 14), (8, 14), (1, 28), (1, 64)) if device.type == "cpu" else ((64, 14), (8, 64)):
            yield Case(images, side, torch.float32 if device.type == "cpu" else torch.bfloat16)

    def _input(self, case: Case, device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        size = (case.images, case.side, case.side, DIM)
        return torch.randn(size, generator=generator, device=device, dtype=case.dtype)

    def verify(self, case: Case, device: torch.device) -> None:
        """Check the layer against itself in float64 with reference windows."""
        torch.manual_seed(0)
        layer = LAYERS["HiLo"]().to(device, case.dtype)
        oracle, eager = copy.deepcopy(layer).double(), copy.deepcopy(layer)
        oracle.impl = eager.impl = "reference"
        given = as_leaves({"x": self._input(case, device)[:1]})
        exact = as_leaves(given, torch.float64)
        found, truth = gradients(given, layer(given["x"]), None, 1), gradients(exact, oracle(exact["x"]), None, 1)
        yardstick = gradients(given, eager(given["x"]), None, 1) if case.dtype.itemsize < 4 else None
        refuse_wrong(f"hilo {case.name}", errors(found, truth, yardstick, case.dtype))

    def makers(self, case: Case, mode: str, device: torch.device, *, everything: bool = False) -> dict[str, Maker]:
        def call(make: Callable[[], nn.Module]) -> Call:
            layer, x = make().eval().to(device, case.dtype), self._input(case, device)
            if mode == "forward":
                return torch.no_grad()(partial(layer, x))
            leaves = [x.requires_grad_(), *layer.parameters()]
            gradient = torch.ones_like(x)
            return lambda: torch.autograd.grad(layer(x), leaves, gradient)

        return {name: partial(call, make) for name, make in LAYERS.items()}

    def plot(self, rows: Sequence[Row], path: Path) -> None:
        """Bars of time relative to HiLo, one group per map size, with the paper's ratios as lines."""
        modes = in_order(r.mode for r in rows)
        figure = Figure(figsize=(8, 3.7 * len(modes)), layout="constrained")
        panels = figure.subplots(len(modes), 1, squeeze=False)[:, 0]
        for axes, mode in zip(panels, modes, strict=True):
            times = select(rows, "time", mode)
            cases = [case for case in in_order(case for case, _ in times) if (case, "HiLo") in times]
            for i, name in enumerate(name for name in LAYERS if name != "HiLo"):
                found = [(x, case) for x, case in enumerate(cases) if (case, name) in times]
                ratios = [times[case, name].p50 / times[case, "HiLo"].p50 for _, case in found]
                where = [x + (i - 1.5) * 0.21 for x, _ in found]
                color, hatch = COLORS[name.removesuffix(UNFUSED)], "//" if name.endswith(UNFUSED) else ""
                bars = axes.bar(where, ratios, 0.2, label=name, color=color, hatch=hatch, edgecolor="white")
                axes.bar_label(bars, fmt="%.2f", fontsize=7)
            for name, claimed in PAPER.items() if mode == "forward" else ():
                label = f"{name} in the paper, {claimed}"
                axes.axhline(claimed, color=COLORS[name], ls="--", lw=1, label=label)
            axes.axhline(1, color=COLORS["HiLo"], lw=1.5, label="HiLo")
            axes.set_xticks(range(len(cases)), cases)
            axes.set(ylabel="time over HiLo's, median")
            axes.set_title(mode, fontsize=10)
            axes.margins(y=0.15)
            axes.spines[["top", "right"]].set_visible(False)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=8, frameon=False, ncols=3, loc="outside lower center")
        figure.suptitle(f"{self.title}\n{rows[0].device}", fontsize=11)
        figure.savefig(path, dpi=150)
