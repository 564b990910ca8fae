"""Measure a model: parameters, multiply-adds, time of a step, memory, where the time goes."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_gmacs(model: nn.Module, images: torch.Tensor) -> float:
    """Billions of multiply-adds of one image, attention operators of foveal included."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images[:1])
    return counter.get_total_flops() / 2e9


def profile_model(
    model: nn.Module,
    input_size: tuple[int, int, int],
    *,
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    train: bool = False,
    repeats: int = 10,
    operators: int = 0,
) -> dict[str, Any]:
    """Measure inference, or a training step without its optimizer.

    Args:
        model: it is moved to the device and the dtype.
        input_size: `(C, H, W)` of an image.
        batch_size: images of a step.
        device: to measure on.
        dtype: of weights and images: "float32", "bfloat16" or "float16".
        train: forward and backward in training mode.
        repeats: measured steps, after three that are not.
        operators: so many of PyTorch's operators that take most time are listed.

    Returns:
        Numbers named as in timm's benchmark: `infer_samples_per_sec`, `infer_step_time` (median, ms; `train_…` with
        `train`), `infer_gmacs` (of one image), `param_count` (millions), `batch_size`, `img_size`; `memory_mb`, the
        most memory that CUDA held; and `operators`, a list of `name`, `ms` and `calls` of one step.

    Raises:
        ValueError: a dtype that is not one of these, or a count below 1.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    for name, value in (("batch_size", batch_size), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    device = torch.device(device)
    gmacs = count_gmacs(model.eval(), torch.zeros(1, *input_size))
    model = model.to(device, DTYPES[dtype]).train(train)
    images = torch.randn(batch_size, *input_size, device=device, dtype=DTYPES[dtype])

    def step() -> None:
        if train:
            model.zero_grad()
            model(images).float().sum().backward()
        else:
            model(images)

    times = []
    with torch.set_grad_enabled(train):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for number in range(3 + repeats):
            _synchronize(device)
            start = time.perf_counter()
            step()
            _synchronize(device)
            if number >= 3:
                times.append(1000 * (time.perf_counter() - start))
        listed = _slowest(step, device, operators) if operators else []
    kind, median = "train" if train else "infer", statistics.median(times)
    found: dict[str, Any] = {
        f"{kind}_samples_per_sec": round(1000 * batch_size / median, 2),
        f"{kind}_step_time": round(median, 3),
        "infer_gmacs": round(gmacs, 4),
        "param_count": round(sum(p.numel() for p in model.parameters()) / 1e6, 3),
        "batch_size": batch_size,
        "img_size": input_size[-1],
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device}, {torch.get_num_threads()} threads",
        "dtype": dtype,
    }
    if device.type == "cuda":
        found["memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return found | ({"operators": listed} if operators else {})


def _slowest(step: Any, device: torch.device, count: int) -> list[dict[str, Any]]:
    """The operators of one step that take most time themselves."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as recorded:
        step()
        _synchronize(device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: getattr(event, key), reverse=True)[:count]
    return [{"name": e.key, "ms": round(getattr(e, key) / 1000, 3), "calls": e.count} for e in events]
