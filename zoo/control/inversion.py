"""Latents, noises and embeddings that lead a generator back to an image.

A model is a function `predict(latents, timestep)`; the mathematics runs in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .latents import Step, clean_and_noise, ddim_step, kind_of

Predict = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Inversion:
    """Latents, noises and embeddings that reproduce an image.

    Attributes:
        latents: from the image to noise, one entry more than steps.
        noises: of each step, noise first; empty for deterministic samplers.
        embeddings: negative embeddings of each step; empty without null-text inversion.
        error: of the reconstruction, the largest difference of the last latents.
    """

    latents: list[Tensor]
    noises: list[Tensor]
    embeddings: list[Tensor]
    error: float = 0.0

    @property
    def start(self) -> Tensor:
        """Latents to sample from."""
        return self.latents[-1]

    def save(self, path: str) -> None:
        """As safetensors; invert once, edit many times."""
        from safetensors.torch import save_file

        parts = {"latents": self.latents, "noises": self.noises, "embeddings": self.embeddings}
        tensors = {f"{name}.{i}": x.contiguous() for name, entries in parts.items() for i, x in enumerate(entries)}
        save_file(tensors, path, metadata={"error": repr(self.error)})

    @staticmethod
    def load(path: str) -> Inversion:
        """The inversion that `save` wrote."""
        from safetensors import safe_open

        parts: dict[str, dict[int, Tensor]] = {"latents": {}, "noises": {}, "embeddings": {}}
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, number = key.split(".")
                parts[name][int(number)] = file.get_tensor(key)
            error = float(file.metadata()["error"])
        lists = ([entries[i] for i in sorted(entries)] for entries in parts.values())
        return Inversion(*lists, error=error)


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def ddim_invert(predict: Predict, latents: Tensor, scheduler, *, rounds: int = 0) -> Inversion:
    """Runs a deterministic sampler backwards, for epsilon, v-prediction and flows.

    Args:
        predict: the model, without guidance or with scale 1.
        latents: clean, `[B, C, …]`.
        scheduler: of diffusers, after `set_timesteps`; DDIM's family, or flow matching by Euler.
        rounds: fixed-point iterations of each step, which make the inversion exact where they converge.

    Returns:
        an `Inversion` with the error of sampling from its start.

    Raises:
        ValueError: another scheduler, or one without timesteps.
    """
    kind, timesteps = kind_of(scheduler), list(scheduler.timesteps)
    if not timesteps:
        raise ValueError("scheduler has no timesteps; call set_timesteps(steps) first")
    x = _float(latents)
    path = [x]
    for i in reversed(range(len(timesteps))):
        forward, backward = _steps(scheduler, kind, i, len(timesteps))
        guess = x
        for again in range(rounds + 1):
            # the first prediction is of the cleaner latents, further ones of the estimate itself
            prediction = _float(predict(guess, timesteps[i]))
            guess = backward(x, prediction, guess, again)
        x = guess
        path.append(x)
    y = x
    for i in range(len(timesteps)):
        forward, _ = _steps(scheduler, kind, i, len(timesteps))
        y = forward(y, _float(predict(y, timesteps[i])))
    return Inversion(path, [], [], float((y - path[0]).abs().max()))


def _steps(scheduler, kind: str, i: int, steps: int) -> tuple[Callable, Callable]:
    """A step of sampling, and the way back given the prediction."""
    if kind == "flow":
        size = float(scheduler.sigmas[i + 1] - scheduler.sigmas[i])
        return (lambda x, v: x + size * v), (lambda x, v, guess, again: x - size * v)
    step = Step.of(scheduler, int(scheduler.timesteps[i]), steps)

    def forward(x: Tensor, prediction: Tensor) -> Tensor:
        clean, _ = clean_and_noise(prediction, x, step.alpha, kind)
        return ddim_step(clean, x, step)

    def backward(x: Tensor, prediction: Tensor, guess: Tensor, again: int) -> Tensor:
        # noise that the prediction stands for at the latents it was made of
        alpha = step.before if again == 0 else step.alpha
        _, noise = clean_and_noise(prediction, guess, min(alpha, 1 - 1e-6), kind)
        clean = (x - (1 - step.before) ** 0.5 * noise) / step.before**0.5
        return step.alpha**0.5 * clean + (1 - step.alpha) ** 0.5 * noise

    return forward, backward


@torch.no_grad()
def ddpm_invert(predict: Predict, latents: Tensor, scheduler, *, seed: int = 0, eta: float = 1.0) -> Inversion:
    """Edit-friendly noises: latents noised independently for every step, and the noise that leads between them.

    Huberman-Spiegelglas et al. (arXiv:2304.06140). `ddpm_replay` reproduces the image exactly.

    Args:
        predict: the model, with the source's prompt and guidance.
        latents: clean, `[B, C, H, W]`.
        scheduler: of diffusion or of a flow, after `set_timesteps`.
        seed: of the noises.
        eta: share of the ancestral sampler's noise, above 0.

    Raises:
        ValueError: eta of 0 or less, or another scheduler.
    """
    kind = kind_of(scheduler)
    if eta <= 0:
        raise ValueError(f"eta={eta} must be above 0: without noise there is none to keep; use ddim_invert")
    x0, timesteps = _float(latents), list(scheduler.timesteps)
    generator = torch.Generator(x0.device).manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)

    steps = [Step.of(scheduler, timestep, len(timesteps)) for timestep in timesteps]
    path = [step.noised(x0, draw()) for step in steps] + [x0]
    noises = []
    for i, (step, timestep) in enumerate(zip(steps, timesteps, strict=True)):
        sigma = eta * step.variance**0.5
        mean = _mean(predict, path[i], timestep, step, sigma, kind)
        if sigma > 0:
            noises.append((path[i + 1] - mean) / sigma)
            path[i + 1] = mean + sigma * noises[-1]  # rounding does not add up
        else:
            noises.append(torch.zeros_like(mean))
            path[i + 1] = mean
    return Inversion(path[::-1], noises, [], float((path[-1] - x0).abs().max()))


def _mean(predict: Predict, x: Tensor, timestep, step: Step, sigma: float, kind: str) -> Tensor:
    clean, _ = clean_and_noise(_float(predict(x, timestep)), x, step.alpha, kind)
    return ddim_step(clean, x, step, sigma)


@torch.no_grad()
def ddpm_replay(predict: Predict, inversion: Inversion, scheduler, *, first: int = 0, eta: float = 1.0) -> Tensor:
    """Samples with the noises of `ddpm_invert`, from step `first` on; the source's prompt gives the source."""
    timesteps = list(scheduler.timesteps)
    x = inversion.latents[::-1][first]
    for i in range(first, len(timesteps)):
        step = Step.of(scheduler, timesteps[i], len(timesteps))
        sigma = eta * step.variance**0.5
        x = _mean(predict, x, timesteps[i], step, sigma, kind_of(scheduler)) + sigma * inversion.noises[i]
    return x


def null_text_invert(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    latents: Tensor,
    scheduler,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    *,
    guidance_scale: float = 7.5,
    inner_steps: int = 10,
    tolerance: float = 1e-5,
) -> Inversion:
    """A negative embedding for each step, with which guided sampling reproduces the image (null-text inversion).

    Adam with the rate `1e-2 (1 - i / 100)` in step i, at most `inner_steps` iterations, until the mean square error is
    below `tolerance + 2e-5 i`.

    Args:
        predict: `predict(latents, timestep, embeddings)`.
        latents: clean, `[B, C, H, W]`.
        scheduler: of diffusion or of a flow, after `set_timesteps`.
        prompt_embeds, negative_embeds: `[B, tokens, channels]`.
        guidance_scale: of the sampling.
        inner_steps, tolerance: see above.

    Raises:
        ValueError: a guidance scale of 1, at which the negative embedding has no effect.
    """
    if guidance_scale == 1:
        raise ValueError("guidance_scale=1 does not look at the negative embedding; there is nothing to invert")
    kind = kind_of(scheduler)
    inverted = ddim_invert(lambda x, t: predict(x, t, prompt_embeds), latents, scheduler)
    path, timesteps = inverted.latents[::-1], list(scheduler.timesteps)
    x, embedding, embeddings = path[0], _float(negative_embeds), []
    for i, timestep in enumerate(timesteps):
        step = Step.of(scheduler, timestep, len(timesteps))
        with torch.no_grad():
            cond = _float(predict(x, timestep, prompt_embeds))

        def move(e: Tensor, x=x, timestep=timestep, step=step, cond=cond) -> Tensor:
            uncond = _float(predict(x, timestep, e.to(negative_embeds)))
            prediction = uncond + guidance_scale * (cond - uncond)
            return ddim_step(clean_and_noise(prediction, x, step.alpha, kind)[0], x, step)

        embedding = embedding.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([embedding], lr=1e-2 * (1 - i / 100))
        with torch.enable_grad():
            for _ in range(inner_steps):
                loss = (move(embedding) - path[i + 1]).square().mean()
                if float(loss.detach()) < tolerance + 2e-5 * i:
                    break
                optimizer.zero_grad()
                (embedding.grad,) = torch.autograd.grad(loss, embedding)
                optimizer.step()
        embeddings.append(embedding.detach().to(negative_embeds))
        with torch.no_grad():
            x = move(embedding.detach())
    return Inversion(inverted.latents, [], embeddings, float((x - path[-1]).abs().max()))


def embeddings_callback(embeddings: Sequence[Tensor]) -> Callable:
    """A `callback_on_step_end` that gives a stock pipeline the negative embedding of each step.

    Step 0 takes `negative_prompt_embeds=embeddings[0]`; ask for
    `callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]`.
    """

    def callback(pipe, step: int, timestep, kwargs: dict) -> dict:
        if step + 1 < len(embeddings):
            both = kwargs["prompt_embeds"].clone()
            rows = both.shape[0] // 2
            both[:rows] = embeddings[step + 1].to(both).expand(rows, -1, -1)
            kwargs["prompt_embeds"] = both
        return kwargs

    return callback
