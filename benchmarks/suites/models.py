"""Backbones against the usual alternatives: images per second and peak memory of inference and training.

Models of one size run in turns with random weights. Memory of inference is the peak beyond parameters and input; that
of a training step includes gradients. The tests of each family check the attention of the backbones.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import foveal.zoo  # noqa: F401  registers the models
import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..benchmark import Benchmark, Maker, Metric
from ..figures import in_order, select
from ..records import Row

SMALL = ("natten_dinat_m", "litv2_s", "biformer_t", "agent_swin_t", "l2vit_t")  # near Swin-T in size
OURS = (*SMALL, "natten_dinat_s", "biformer_s")
PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny", "swin_small_patch4_window7_224", "convnext_small")
PEERS += ("vit_small_patch16_224",)
QUICK = (*SMALL, *PEERS[:2])  # default sizes on a CPU
RIVALS = [(name, peer) for name in OURS for peer in (PEERS[2:4] if name == "natten_dinat_s" else PEERS[:2])]
SIZED = ("swin", "agent", "vit", "inline", "flatten", "flowformer", "illama", "binary", "smlpnet")  # learn a size
SIZES = (224, 384, 512, 1024)
BATCHES = {"cpu": {224: 8, 384: 4, 512: 2, 1024: 1}, "cuda": {224: 128, 384: 48, 512: 24, 1024: 6}}


@dataclass(frozen=True)
class Case:
    size: int
    batch: int
    dtype: torch.dtype
    kernel = "backbone"
    source = "ImageNet and dense tasks"

    @property
    def name(self) -> str:
        return str(self.size)


def build(name: str, size: int) -> nn.Module:
    """Model with random weights; its windows and biases fit images of this size. "MODEL window 56" has such windows."""
    name, _, window = name.partition(" window ")
    options: dict[str, Any] = {"img_size": size} if name.startswith(SIZED) else {}
    if window:
        options["window_size"] = int(window)
    return timm.create_model(name, **options)


def inference(model: Any, images: Tensor, precision: Callable) -> Callable[[], Tensor]:
    model.eval()

    @torch.no_grad()
    def call() -> Tensor:
        with precision():
            return model(images)

    return call


def training(model: Any, images: Tensor, precision: Callable) -> Callable[[], Tensor]:
    """Training step: forward, cross entropy, backward and AdamW."""
    model.train()
    labels = torch.arange(len(images), device=images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def call() -> Tensor:
        with precision():
            loss = cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return call


def and_compiled(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name + suffix for name in names for suffix in ("", " compiled"))


def short(name: str) -> str:
    return name.replace("_patch4_window7_224", "").replace("_patch16_224", "")


class Models(Benchmark):
    name = "backbones"
    suite = "models"
    title = "Backbones"
    our_names = and_compiled(OURS)
    rivals = tuple((name + suffix, peer + suffix) for name, peer in RIVALS for suffix in ("", " compiled"))
    modes = ("inference", "training step")
    case: ClassVar[type[Case]] = Case
    batches: ClassVar[Mapping[str, Mapping[int, int]]] = BATCHES
    cpu_sizes: ClassVar[Sequence[int]] = (224, 512)  # by default

    def cases(self, device: torch.device, *, everything: bool = False) -> Iterator[Case]:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        for size in SIZES if everything or device.type != "cpu" else self.cpu_sizes:
            yield self.case(size, self.batches[device.type][size], dtype)

    def makers(self, case: Case, mode: str, device: torch.device, *, everything: bool = False) -> dict[str, Maker]:
        quick = device.type == "cpu" and not everything
        if quick and mode != "inference":
            return {}
        mixed = partial(torch.autocast, device.type, torch.bfloat16)
        precision = nullcontext if case.dtype == torch.float32 else mixed
        step = inference if mode == "inference" else training

        def make(name: str, compiled: bool) -> Callable[[], Tensor]:
            model = build(name, case.size).to(device)
            images = torch.randn(case.batch, 3, case.size, case.size, device=device)
            return step(torch.compile(model, dynamic=False) if compiled else model, images, precision)

        names = self.names(case, quick=quick)
        made: dict[str, Maker] = {name: partial(make, name, False) for name in names}
        return made if quick else made | {f"{name} compiled": partial(make, name, True) for name in names}

    def names(self, case: Case, *, quick: bool) -> Sequence[str]:
        """Models of a size; `quick` leaves out those that take a CPU long."""
        return QUICK if quick else (*OURS, *PEERS)

    def derive(self, case: Case, mode: str, measured: Sequence[Metric], device: torch.device) -> Iterator[Metric]:
        """Images per second."""
        for m in measured:
            if m.metric == "time" and m.p20 and m.p80:
                middle, low, high = (1e3 * case.batch / x for x in (m.p50, m.p80, m.p20))
                yield Metric(m.provider, "images/s", "1/s", middle, low, high)

    def plot(self, rows: Sequence[Row], path: Path) -> None:
        """Bars of images per second and of memory, one row of panels per size and mode."""
        groups = in_order((r.mode, r.case) for r in rows)
        bars_of = {group: in_order(r.provider for r in rows if (r.mode, r.case) == group) for group in groups}
        heights = [1.0 + 0.24 * len(bars_of[group]) for group in groups]
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        panels = figure.subplots(len(groups), 2, squeeze=False, height_ratios=heights)
        for line, (mode, size) in zip(panels, groups, strict=True):
            for axes, metric, label in zip(
                line, ("images/s", "memory"), ("images a second", "MiB a call"), strict=True
            ):
                found = {
                    provider: row.p50 for (case, provider), row in select(rows, metric, mode).items() if case == size
                }
                names = [name for name in bars_of[mode, size] if name in found][::-1]
                colors = ["#c1440e" if name in self.our_names else "#56789a" for name in names]
                drawn = axes.barh([short(name) for name in names], [found[name] for name in names], color=colors)
                labels = [f"{found[n]:,.0f}" if found[n] >= 100 else f"{found[n]:.3g}" for n in names]
                axes.bar_label(drawn, labels, padding=3, fontsize=8)
                axes.set_title(f"{mode} at {size}x{size}: {label}", fontsize=10)
                axes.tick_params(labelsize=8)
                axes.margins(x=0.12, y=0.02)
                axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{self.title}, {rows[0].dtype}; ours in red\n{rows[0].device}", fontsize=11)
        figure.savefig(path, dpi=150)
