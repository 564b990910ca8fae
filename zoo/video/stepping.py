"""Noise to begin with, and the scheduler's timesteps."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

NEEDED = "prediction_type='flow_prediction' and use_flow_sigmas=True"


def draw_noise(
    shape: tuple[int, ...],
    *,
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
    latents: Tensor | None = None,
) -> Tensor:
    """Noise in float32, drawn or as given.

    Raises:
        ValueError: latents of another shape, or not as many generators as videos.
    """
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(f"generator is a list of {len(generator)}, there are {shape[0]} videos")
    if latents is None:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    if latents.shape != shape:
        raise ValueError(f"latents has shape {list(latents.shape)}, expected {list(shape)}")
    return latents.to(device=device, dtype=torch.float32)


def begin_with(video: Tensor, noise: Tensor, scheduler: Any, strength: float) -> tuple[Tensor, int]:
    """A video under the noise of the first step that changes it, and the number of that step.

    Args:
        video, noise: `[B, C, T, H, W]`, as the model sees them.
        scheduler: with timesteps that are set.
        strength: share of the steps, in (0, 1].

    Raises:
        ValueError: another number of frames, or a share that is no step.
    """
    if video.shape != noise.shape:
        raise ValueError(
            f"video has {video.shape[2]} frames as the model sees them, and {noise.shape[2]} are to be made: with "
            "strength, num_frames is that of the video"
        )
    steps = len(scheduler.timesteps)
    begin = steps - int(steps * strength)
    if begin == steps:
        raise ValueError(f"strength={strength} of {steps} steps is no step; it must be at least {1 / steps:.3g}")
    sigma = scheduler.sigmas[begin].to(noise)
    return (1 - sigma) * video + sigma * noise, begin


def check_scheduler(scheduler: Any) -> None:
    """Refuse schedulers that take a model's output for something other than flow.

    Raises:
        ValueError: names the scheduler, what it does and what it needs.
    """
    kind, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    predicts, can_flow = config.get("prediction_type"), "use_flow_sigmas" in config
    other = f"or take FlowMatchEulerDiscreteScheduler or UniPCMultistepScheduler({NEEDED})"
    remedy = f"it needs {NEEDED}: {kind}.from_config(pipe.scheduler.config, {NEEDED.replace(' and', ',')}), {other}"
    if not can_flow:
        remedy = f"it cannot be told that this model predicts flow; {other.removeprefix('or ')}"
    if predicts not in (None, "flow_prediction"):
        raise ValueError(f"the scheduler {kind} has prediction_type={predicts!r}: {remedy}")
    if not config.get("use_flow_sigmas", True) or not hasattr(scheduler, "set_begin_index"):
        raise ValueError(f"the scheduler {kind} has no flow-matching noise levels: {remedy}")
    if config.get("use_dynamic_shifting"):
        raise ValueError(f"the scheduler {kind} has use_dynamic_shifting=True; it must be False, with a fixed shift")


def set_timesteps(scheduler: Any, steps: int, sigmas: Sequence[float] | None, device: torch.device) -> Tensor:
    """The scheduler's timesteps, 1000 to 0, and a fresh state.

    Raises:
        ValueError: sigmas for a scheduler that makes its own; noise levels that do not fall to 0 from 1 at most, or
            timesteps that are not 1000 times them: a scheduler of another kind.
    """
    kind = type(scheduler).__name__
    if sigmas is not None and "sigmas" not in signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"sigmas cannot be given to {kind}")
    try:
        if sigmas is None:
            scheduler.set_timesteps(steps, device=device)
        else:
            scheduler.set_timesteps(sigmas=np.asarray(sigmas, dtype=np.float32), device=device)
    except Exception as error:  # each has conditions of its own
        raise ValueError(f"the scheduler {kind} cannot make {steps} timesteps: {error}") from error
    levels, timesteps = getattr(scheduler, "sigmas", None), scheduler.timesteps
    if levels is None or not _is_flow(levels.double().cpu(), timesteps.double().cpu()):
        shown = "none" if levels is None else f"{float(levels[0]):.4g} to {float(levels[-1]):.4g}"
        raise ValueError(
            f"the scheduler {kind} has noise levels of {shown} and timesteps from {float(timesteps[0]):.4g}; those of "
            "a flow fall from at most 1 to 0, with timesteps of 1000 times that. It needs "
            f"{NEEDED}, or is of another kind"
        )
    scheduler.set_begin_index(0)
    return timesteps


def _is_flow(levels: Tensor, timesteps: Tensor) -> bool:
    falls = bool((levels.diff() <= 0).all() and levels[0] <= 1.001 and levels[-1].abs() <= 0.001)
    # some schedulers round timesteps to integers
    return falls and bool((timesteps - 1000 * levels[: len(timesteps)]).abs().max() <= 2)
