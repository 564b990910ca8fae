"""Quality and time of a plan in a pipeline, measured against the dense model on the same noise."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .acceleration import accelerate, accelerations
from .plan import Plan
from .presets import as_plan
from .recall import Recall

NETWORKS = ("alex", "vgg", "squeeze")  # of torchmetrics' LPIPS


@dataclass
class Run:
    """One call of a pipeline.

    Attributes:
        latents: after each step, on the CPU.
        frames: the result, `[frames, C, H, W]` in 0..1, of the first video or image.
        seconds: of the call.
        memory: largest number of bytes on the GPU during the call, None without one.
        graphs: compiled during the call; for the same sizes as in the call before, all of them are recompiled ones.
    """

    latents: list[Tensor]
    frames: Tensor
    seconds: float
    memory: int | None
    graphs: int = 0


@dataclass
class Measurement:
    """Result of `measure`. PSNR is in dB; the yardstick is the dense model with another seed.

    Attributes:
        plan: the measured plan.
        psnr_by_step, yardstick_by_step: of the latents after each step against the dense ones of the first seed.
        psnr, yardstick: of the result.
        ssim, yardstick_ssim: structural similarity of the result, mean of its frames, at most 1.
        recall, worst_head: by site, share of the attention mass that is kept.
        densities: by site, share of the pairs that are kept.
        dense: by site, why it was dense in the last step.
        runs: "dense", "plan" and "other seed".
        lpips, yardstick_lpips: perceptual distance of the result, mean of its frames; None if it was not asked for.
    """

    plan: Plan
    psnr_by_step: list[float]
    yardstick_by_step: list[float]
    psnr: float
    yardstick: float
    ssim: float
    yardstick_ssim: float
    recall: dict[str, float]
    worst_head: dict[str, float]
    densities: dict[str, float | None]
    dense: dict[str, str]
    runs: dict[str, Run] = field(repr=False)
    lpips: float | None = None
    yardstick_lpips: float | None = None

    @property
    def speedup(self) -> float:
        """Ratio of the seconds, dense with the other seed (in which nothing is observed) to plan."""
        return self.runs["other seed"].seconds / self.runs["plan"].seconds

    def __str__(self) -> str:
        seconds = {name: run.seconds for name, run in self.runs.items()}
        lines = [
            f"plan {self.plan.name}, {self.plan.words if self.plan.of_layer(-1) else 'by layer'}: "
            f"{seconds['other seed']:.2f} s dense, {seconds['plan']:.2f} s by the plan, {self.speedup:.2f}x",
            f"drift to dense on the same noise: {self.psnr:.1f} dB, SSIM {self.ssim:.3f} "
            f"(dense with another seed: {self.yardstick:.1f} dB, {self.yardstick_ssim:.3f})",
        ]
        if self.lpips is not None:
            lines.append(f"LPIPS {self.lpips:.4f} (dense with another seed: {self.yardstick_lpips:.4f})")
        if any(run.graphs for run in self.runs.values()):
            lines.append("graphs compiled: " + ", ".join(f"{name} {run.graphs}" for name, run in self.runs.items()))
        if (memory := self.runs["plan"].memory) is not None:
            dense = self.runs["other seed"].memory or 0
            lines.append(f"peak memory {memory / 2**30:.2f} GiB (dense {dense / 2**30:.2f})")
        if self.recall:
            lines.append(f"{'recall':>8} {'worst head':>10} {'density':>8}  site")
        for path, mean in self.recall.items():
            density = self.densities[path]
            shown = "?" if density is None else f"{density:.3f}"
            lines.append(f"{mean:>8.3f} {self.worst_head[path]:>10.3f} {shown:>8}  {path}")
        lines += [f"dense: {path}  {reason}" for path, reason in self.dense.items()]
        return "\n".join(lines)

    def save(self, folder: str | Path) -> None:
        """Write plan.json, steps.csv, sites.csv and contact_sheet.png (dense, plan, other seed; frames from left)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not callable(self.plan.mask) or "<" not in getattr(self.plan.mask, "__qualname__", "<"):
            self.plan.save(folder / "plan.json")
        with (folder / "steps.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "psnr", "psnr_other_seed"])
            writer.writerows(zip(range(len(self.psnr_by_step)), self.psnr_by_step, self.yardstick_by_step, strict=True))
        with (folder / "sites.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["site", "recall", "worst_head", "density"])
            writer.writerows(
                [path, self.recall[path], self.worst_head[path], self.densities[path]] for path in self.recall
            )
        contact_sheet({name: run.frames for name, run in self.runs.items()}).save(folder / "contact_sheet.png")


def measure(
    pipe: Any,
    plan: Plan | Mapping[str, Any] | str | Path,
    *,
    seeds: tuple[int, int] = (0, 1),
    recall_steps: int = 3,
    changes: Mapping[str, Any] | None = None,
    lpips: str | Callable[[Tensor, Tensor], Any] | None = None,
    **call: Any,
) -> Measurement:
    """Run a pipeline dense, dense with another seed, and by a plan, and compare. A plan at work is set aside meanwhile.

    Args:
        pipe: a pipeline of diffusers that takes callback_on_step_end.
        plan: as `accelerate` takes it.
        seeds: of the noise that is compared, and of the yardstick.
        recall_steps: number of steps, spread over the run, in which recall is observed; 0 leaves it out.
        changes: fields of the plan that are replaced.
        lpips: "alex", "vgg" or "squeeze" for torchmetrics' LPIPS (arXiv:1801.03924), whose network torchvision
            downloads, or a function of two batches of images `[N, 3, H, W]` in -1..1, such as `lpips.LPIPS()`; None for
            none.
        call: arguments of the pipeline, such as prompt, num_inference_steps, height and width.

    Returns:
        A `Measurement`: print it, or `save` it.

    Raises:
        ValueError, TypeError: as `accelerate`; a pipeline whose output has neither frames nor images.
        ImportError: the library or the weights of `lpips` are not there; nothing has run then.
    """
    plan = as_plan(plan, **(changes or {}))
    distance = None if lpips is None else perceptual(lpips)
    aside = accelerations(pipe)
    for one in aside:
        one.undo()
    try:
        steps = int(call.get("num_inference_steps") or 50)
        observed = {round(i * (steps - 1) / max(recall_steps - 1, 1)) for i in range(recall_steps)}
        if recall_steps:
            with Recall(pipe, plan, steps=observed) as recall:
                dense = run(pipe, seeds[0], call)
            found = recall.mean, recall.worst, recall.densities
        else:
            dense, found = run(pipe, seeds[0], call), ({}, {}, {})
        other = run(pipe, seeds[1], call)
        with accelerate(pipe, plan) as acceleration:
            mine = run(pipe, seeds[0], call)
            reasons = dict(acceleration.dense)
    finally:
        for one in aside:
            one.install()
    return Measurement(
        plan,
        [psnr(a, b) for a, b in zip(mine.latents, dense.latents, strict=True)],
        [psnr(a, b) for a, b in zip(other.latents, dense.latents, strict=True)],
        psnr(mine.frames, dense.frames, 1.0),
        psnr(other.frames, dense.frames, 1.0),
        ssim(mine.frames, dense.frames),
        ssim(other.frames, dense.frames),
        *found,
        dense=reasons,
        runs={"dense": dense, "plan": mine, "other seed": other},
        lpips=None if distance is None else distance(mine.frames, dense.frames),
        yardstick_lpips=None if distance is None else distance(other.frames, dense.frames),
    )


def run(pipe: Any, seed: int, call: Mapping[str, Any]) -> Run:
    """Call a pipeline with the noise of a seed."""
    latents: list[Tensor] = []
    on_gpu = torch.cuda.is_available()

    def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"].detach().float().cpu())
        return values

    given = {"output_type": "pt"} | dict(call)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, start = _graphs(), time.perf_counter()
    out = pipe(generator=torch.Generator().manual_seed(seed), callback_on_step_end=keep, **given)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    memory = torch.cuda.max_memory_allocated() if on_gpu else None
    return Run(latents, _frames(out), seconds, memory, _graphs() - before)


def _graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] if "torch._dynamo" in sys.modules else 0


def _frames(out: Any) -> Tensor:
    """`[frames, C, H, W]` in 0..1 of a pipeline's output."""
    result = getattr(out, "frames", None)
    result = getattr(out, "images", None) if result is None else result
    if result is None:
        raise ValueError(f"{type(out).__name__} has neither frames nor images")
    first = torch.as_tensor(result[0]).detach().float().cpu()
    return first.clamp(0, 1) if first.dim() == 4 else first[None].clamp(0, 1)


def psnr(x: Tensor, reference: Tensor, span: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB; the peak is the range of the reference when `span` is None. inf when equal."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    span = (reference.max() - reference.min()).item() if span is None else span
    return peak_signal_noise_ratio(x, reference, data_range=span).item()


def ssim(x: Tensor, reference: Tensor) -> float:
    """Structural similarity of frames `[frames, C, H, W]` in 0..1, by windows of up to 11 pixels."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    window = min(11, *(n - 1 + n % 2 for n in x.shape[-2:]))  # odd
    smaller = {} if window == 11 else {"gaussian_kernel": False, "kernel_size": window}
    return structural_similarity_index_measure(x, reference, data_range=1.0, **smaller).item()


def perceptual(lpips: str | Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], float]:
    """Perceptual distance of frames `[frames, C, H, W]` in 0..1, mean of the frames; see `measure`.

    Raises:
        ValueError: an unknown name.
        ImportError: a library or the weights of its network are missing; the message says which and what else to pass.
    """
    if isinstance(lpips, str):
        if lpips not in NETWORKS:
            raise ValueError(f"lpips={lpips!r} must be one of {NETWORKS}, a function of two batches of images or None")
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            network: Any = LearnedPerceptualImagePatchSimilarity(net_type=lpips)  # pyright: ignore[reportArgumentType]
        except (ImportError, OSError) as error:  # torchvision is not there, or its weights cannot be downloaded
            raise ImportError(
                f"lpips={lpips!r} needs torchmetrics, torchvision and its weights of this network, which it downloads "
                f"({error}); pass lpips=None or a function of two batches of images"
            ) from error
    else:
        network = lpips

    @torch.no_grad()
    def distance(x: Tensor, reference: Tensor) -> float:
        x, reference = (2 * (y[:, :3].expand(-1, 3, -1, -1)) - 1 for y in (x, reference))
        return float(torch.as_tensor(network(x, reference)).float().mean())

    return distance


def contact_sheet(rows: Mapping[str, Tensor], *, columns: int = 8, side: int = 160) -> Any:
    """A picture of videos `[frames, C, H, W]` below each other under their names, a few frames each."""
    from PIL import Image, ImageDraw

    band, shown = 18, []
    for frames in rows.values():
        count = min(columns, len(frames))
        picks = [round(i * (len(frames) - 1) / max(count - 1, 1)) for i in range(count)]
        pictures = []
        for frame in frames[picks]:
            frame = frame[:3].expand(3, -1, -1) if len(frame) < 3 else frame[:3]
            pixels = (frame * 255).round().byte().permute(1, 2, 0).numpy()
            height, width = pixels.shape[:2]
            scale = side / max(height, width)
            size = (max(round(width * scale), 1), max(round(height * scale), 1))
            pictures.append(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST))
        shown.append(pictures)
    width, height = shown[0][0].size
    sheet = Image.new("RGB", (max(len(x) for x in shown) * (width + 2), len(rows) * (height + band)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, pictures) in enumerate(zip(rows, shown, strict=True)):
        draw.text((2, i * (height + band) + 3), name, fill="black")
        for j, picture in enumerate(pictures):
            sheet.paste(picture, (j * (width + 2), i * (height + band) + band))
    return sheet
