"""What surrounds a step of sampling: the scheduler's timesteps, and the caller's function after each step."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor


def set_timesteps(scheduler: Any, steps: int, sigmas: Sequence[float] | None, device: torch.device) -> Tensor:
    """The scheduler's timesteps, 1000 to 0, and a fresh state.

    Raises:
        ValueError: sigmas for a scheduler that makes its own.
    """
    if sigmas is None:
        scheduler.set_timesteps(steps, device=device)
    elif "sigmas" not in signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"sigmas cannot be given to {type(scheduler).__name__}")
    else:
        scheduler.set_timesteps(sigmas=np.asarray(sigmas, dtype=np.float32), device=device)
    scheduler.set_begin_index(0)
    return scheduler.timesteps


def call_back(
    pipe: Any,
    callback: Callable[..., dict] | None,
    names: Sequence[str],
    step: int,
    t: Tensor,
    latents: Tensor,
    conditions: dict[str, dict[str, Any]],
) -> Tensor:
    """Show a step's tensors, those of `names`, to the caller's function, and take what it returns."""
    if callback is None:
        return latents
    sides = {"prompt_embeds": conditions["cond"], "negative_prompt_embeds": conditions.get("uncond", {})}
    tensors = {"latents": latents} | {name: side.get("encoder_hidden_states") for name, side in sides.items()}
    returned = callback(pipe, step, t, {name: tensors[name] for name in names})
    for name, side in sides.items():
        if name in returned:
            side["encoder_hidden_states"] = returned[name]
    return returned.get("latents", latents)
