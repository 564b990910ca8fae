"""Latents moved down the gradient of a loss on observed maps, between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...sites import Schedule
from ...sites.models import models_of
from ...sites.schedule import Moment
from ..edit import Edit


class LatentLoss(Edit):
    """`z <- z - size ∇ loss` at the latents of the step that comes, through `Control.callback`.

    One more evaluation of the conditional rows, with gradients. Ask the pipeline for
    `callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]`; `update` serves the step 0, on the latents that
    the pipeline is given.

    Args:
        loss: of the observers, after the evaluation; a scalar, or several whose gradients are each scaled to length 1.
        observers: edits of the same Control that observe, such as `WordMask` and `SelfMaps`.
        size: step size by (step, steps); of each loss if there are several.
        mask: where latents may change, broadcastable to them; everywhere when None.
        repeats: updates of each step.
        schedule: steps that are updated.
    """

    def __init__(
        self,
        loss: Callable[[], Tensor | Sequence[Tensor]],
        observers: Sequence[Any],
        size: Callable[[int, int | None], float | Sequence[float]],
        *,
        mask: Tensor | None = None,
        repeats: int = 1,
        schedule: Schedule | None = None,
    ):
        self.loss, self.observers, self.size = loss, tuple(observers), size
        self.mask, self.repeats, self.schedule = mask, repeats, schedule or Schedule()
        self.values: list[float] = []

    def sites(self, sites: Sequence[Any]) -> list[Any]:
        return []

    def begin(self) -> None:
        self.values = []

    def latents(self, step: int, total: int | None, latents: Tensor, control: Any) -> Tensor:
        pipe, kwargs = control.at
        timesteps = pipe.scheduler.timesteps
        if step + 1 >= len(timesteps) or not self.schedule.active(Moment(step + 1, total or len(timesteps))):
            return latents
        if "prompt_embeds" not in kwargs:
            raise ValueError("callback_on_step_end_tensor_inputs must name 'latents' and 'prompt_embeds'")
        embeds = kwargs["prompt_embeds"][-latents.shape[0] :]
        added = None
        if "add_text_embeds" in kwargs:
            added = {"text_embeds": kwargs["add_text_embeds"], "time_ids": kwargs["add_time_ids"]}
            added = {name: x[-latents.shape[0] :] for name, x in added.items()}
        return self.update(control, latents, timesteps[step + 1], embeds, step + 1, total, added)

    def update(
        self,
        control: Any,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        step: int = 0,
        total: int | None = None,
        added: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Latents after the updates at a timestep.

        Args:
            control: installed.
            latents: `[B, C, H, W]`.
            timestep: at which they are.
            prompt_embeds: of the conditional rows.
            step, total: of the run.
            added: `added_cond_kwargs` of SDXL.
        """
        (model,) = models_of(control.pipe_or_model).values()
        scheduler = getattr(control.pipe_or_model, "scheduler", None)
        for _ in range(self.repeats):
            kept = [dict(vars(observer)) for observer in self.observers]
            for observer in self.observers:
                observer.begin()
            with torch.enable_grad(), control.conditional():
                z = latents.detach().requires_grad_()
                scaled = z if scheduler is None else scheduler.scale_model_input(z, timestep)
                options = {} if added is None else {"added_cond_kwargs": added}
                model(scaled, timestep, encoder_hidden_states=prompt_embeds, **options)
                found = self.loss()
                losses = [found] if isinstance(found, Tensor) else list(found)
                gradients = [torch.autograd.grad(x, z, retain_graph=True)[0] for x in losses]
            for observer, state in zip(self.observers, kept, strict=True):
                vars(observer).update(state)
            self.values.append(float(sum(x.detach() for x in losses)))
            sizes = self.size(step, total)
            if isinstance(sizes, Sequence):  # 0 / 0 is 0
                lengths = [gradient.norm() for gradient in gradients]
                parts = [g / n.masked_fill(n == 0, 1) for g, n in zip(gradients, lengths, strict=True)]
                move = sum(size * part for size, part in zip(sizes, parts, strict=True))
            else:
                move = sizes * sum(gradients)
            latents = latents - (move if self.mask is None else self.mask.to(latents) * move)
        return latents.detach()
