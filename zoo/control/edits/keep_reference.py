"""Latents that a word does not decide taken from a reference, by the gradient with respect to the word's map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...sites import Call, Schedule
from ...sites.models import models_of
from ...sites.schedule import Moment
from ..edit import Context, Edit
from ..latents import Step, clean_and_noise, kind_of
from ..where import Where
from .blend import blend


class KeepReference(Edit):
    """`z <- m z + (1 - m) z_ref` at the latents of the step that comes, through `Control.callback`.

    One more evaluation of the conditional rows, with gradients with respect to the map of a word at one of the chosen
    sites, the last that runs. Ask the pipeline for `callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]`.

    Args:
        word: of the Control.
        reference: clean latents, `[1, C, H, W]`; noised to the timestep, with one noise for the run.
        mask: `mask(clean estimate, columns [B, tokens, heads], (rows, columns)) → bool [rows, columns]` of the tokens
            that keep their latents.
        where, schedule: sites and steps.
        seed: of the noise.
    """

    def __init__(
        self,
        word: str,
        reference: Tensor,
        mask: Callable[[Tensor, Tensor, tuple[int, int]], Tensor],
        *,
        where: Where | None = None,
        schedule: Schedule | None = None,
        seed: int = 0,
    ):
        self.words, self.reference, self.make_mask, self.seed = (word,), reference, mask, seed
        self.where, self.steps = where or Where(kinds=("cross",)), schedule or Schedule()
        self.open = False
        self._seen: tuple[Tensor, tuple[int, int]] | None = None
        self.masks: list[Tensor] = []

    def check(self, control: Any) -> None:
        if not self.sites(control.sites):
            raise ValueError(f"{self} has no site: where is {self.where}, of {len(control.sites)} attentions")

    def begin(self) -> None:
        if not self.open:
            self.masks = []

    def plan(self, context: Context) -> Context | None:
        return context if self.open else None

    def columns(self, call: Call, plan: Context) -> Tensor | None:
        span, grid = plan.span(call, "text", keys=True), plan.layout.grid_of(plan.site)
        if span is None or grid is None or len(grid) != 2:
            return None
        column = torch.zeros(call.key.shape[1], 1, device=call.query.device)
        column[plan.places_of(self.words, span)] = 1
        return column

    def read(self, call: Call, plan: Context, maps: Tensor) -> None:
        size = plan.layout.grid_of(plan.site)
        assert size is not None
        self._seen = (maps[..., 0].detach().requires_grad_(), (size[0], size[1]))

    def out(self, call: Call, plan: Context, out: Tensor) -> Tensor:
        """Adds `map V - (map V)`, which is zero, so that the output depends on the word's map."""
        span = plan.span(call, "text", keys=True)
        if span is None or self._seen is None:
            return out
        tokens = plan.places_of(self.words, span)
        share = self._seen[0][..., None] * call.value[:, tokens].mean(1, keepdim=True)
        return out + share - share.detach()

    def _mask_of(self, clean: Tensor) -> Tensor:
        if self._seen is None:
            raise ValueError(f"{self} saw no attention to text at {self.where}")
        return self.make_mask(clean, *self._seen)

    def latents(self, step: int, total: int | None, latents: Tensor, control: Any) -> Tensor:
        pipe, kwargs = control.at
        timesteps = pipe.scheduler.timesteps
        if step + 1 >= len(timesteps) or not self.steps.active(Moment(step + 1, total or len(timesteps))):
            return latents
        if "prompt_embeds" not in kwargs:
            raise ValueError("callback_on_step_end_tensor_inputs must name 'latents' and 'prompt_embeds'")
        embeds = kwargs["prompt_embeds"][-latents.shape[0] :]
        return self.update(control, latents, timesteps[step + 1], embeds)

    def update(self, control: Any, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Latents at a timestep, those outside of the mask the reference's."""
        (model,) = models_of(control.pipe_or_model).values()
        scheduler = control.pipe_or_model.scheduler
        at = Step.of(scheduler, timestep, len(scheduler.timesteps))
        self._seen = None
        self.open = True
        try:
            with torch.enable_grad(), control.conditional():
                scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
                prediction = model(scale(latents, timestep), timestep, encoder_hidden_states=prompt_embeds).sample
                clean, _ = clean_and_noise(prediction, latents, at.alpha, kind_of(scheduler))
                mask = self._mask_of(clean)
        finally:
            self.open = False
        self.masks.append(mask)
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(1, *latents.shape[1:], generator=generator).to(latents)
        reference = at.noised(self.reference.to(latents), noise).expand_as(latents)
        large = interpolate(mask.float()[None, None], size=latents.shape[-2:]).to(latents)
        return blend(latents, reference, large).detach()
