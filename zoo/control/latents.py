"""Latents between steps: clean estimates, steps with noise inside a mask, pasted layers, low frequencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = ("epsilon", "v_prediction", "sample", "flow")


def clean_and_noise(prediction: Tensor, sample: Tensor, alpha: float | Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Estimates of clean latents and of noise from a prediction.

    Args:
        prediction, sample: of one shape.
        alpha: cumulated alpha of the timestep for diffusion; for "flow", the noise level sigma in 0..1.
        kind: "epsilon", "v_prediction", "sample" or "flow" (velocity = noise - clean).

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {KINDS}")
    if kind == "flow":
        return sample - alpha * prediction, sample + (1 - alpha) * prediction
    root, rest = torch.as_tensor(alpha).to(sample) ** 0.5, (1 - torch.as_tensor(alpha).to(sample)) ** 0.5
    if kind == "epsilon":
        return (sample - rest * prediction) / root, prediction
    if kind == "v_prediction":
        return root * sample - rest * prediction, root * prediction + rest * sample
    return prediction, (sample - root * prediction) / rest


@dataclass(frozen=True)
class Step:
    """A step of a sampler from a timestep to the one before, of diffusion or of a flow.

    Attributes:
        alpha, before: cumulated alphas of both; of a flow, its noise levels sigma.
        flow: whether latents are `(1 - sigma) clean + sigma noise`, else `√alpha clean + √(1 - alpha) noise`.
    """

    alpha: float
    before: float
    flow: bool = False

    @staticmethod
    def of(scheduler, timestep: Any, steps: int) -> Step:
        """The step of a scheduler of diffusers: with `alphas_cumprod`, or of flow matching by Euler.

        Raises:
            ValueError: another scheduler, or a timestep that a flow's does not have.
        """
        if kind_of(scheduler) == "flow":
            found = (torch.as_tensor(scheduler.timesteps) == float(timestep)).nonzero().flatten()
            if not len(found):
                raise ValueError(f"timestep={float(timestep)} is none of scheduler.timesteps")
            first, last = (float(scheduler.sigmas[int(found[0]) + i]) for i in (0, 1))
            return Step(first, last, flow=True)
        previous = int(timestep) - scheduler.config.num_train_timesteps // steps
        before = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
        return Step(float(scheduler.alphas_cumprod[int(timestep)]), float(before))

    def shares(self, alpha: float) -> tuple[float, float]:
        """Factors of clean latents and of noise at a level."""
        return (1 - alpha, alpha) if self.flow else (alpha**0.5, (1 - alpha) ** 0.5)

    @property
    def variance(self) -> float:
        """Of the noise of the ancestral sampler, DDPM's: `n'² / n² (n² - (s / s')² n'²)`, s and n the shares."""
        (s, n), (s_before, n_before) = self.shares(self.alpha), self.shares(self.before)
        return n_before**2 / n**2 * max(n**2 - (s / s_before * n_before) ** 2, 0.0)

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Latents at the timestep."""
        s, n = self.shares(self.alpha)
        return s * clean + n * noise


def kind_of(scheduler: Any) -> str:
    """Return what the model of a scheduler predicts, one of `KINDS`.

    Raises:
        ValueError: a scheduler that is neither of DDIM's family nor of flow matching.
    """
    if hasattr(scheduler, "alphas_cumprod"):
        return scheduler.config.prediction_type
    if hasattr(scheduler, "sigmas") and "Flow" in type(scheduler).__name__:
        return "flow"
    raise ValueError(f"{type(scheduler).__name__} is no scheduler of DDIM's family or of flows")


def ddim_step(clean: Tensor, sample: Tensor, step: Step, sigma: Tensor | float = 0.0, noise: Tensor | None = None):
    """`x_before = (s' - s b) x0 + b x + σ ε` with `b = √((n'² - σ²) / n²)`, s and n the shares of clean and noise.

    Of diffusion, DDIM's step; of a flow, Euler's when sigma is 0.

    Args:
        clean: estimate x0.
        sample: x.
        step: alphas.
        sigma: of the noise, a number or by pixel; 0 is deterministic.
        noise: ε; None for none.
    """
    sigma = torch.as_tensor(sigma).to(sample)
    (s, n), (s_before, n_before) = step.shares(step.alpha), step.shares(step.before)
    b = (n_before**2 - sigma.square()).clamp(min=0).sqrt() / n
    out = (s_before - s * b) * clean + b * sample
    return out if noise is None else out + sigma * noise


def virtual_step(
    clean_source: Tensor,
    sample: Tensor,
    prediction: Tensor,
    step: Step,
    *,
    kind: str = "epsilon",
    source: Sequence[int] | None = None,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    eta: float = 1.0,
    clip: float | None = 1.0,
    gated: bool = True,
) -> Tensor:
    """A step whose source row reconstructs the source exactly, without inversion (ViMAEdit).

    The clean estimate becomes `x0 + x̂0 - x̂0[source row]`, then is clipped.

    Args:
        clean_source: x0, `[1, C, …]`.
        sample: `[rows, C, …]`.
        prediction: of the rows.
        step: alphas.
        kind: of the prediction, see `clean_and_noise`.
        source: the source row of each row; the first one when None.
        mask: where noise is added, broadcastable; nowhere when None.
        noise: of all rows, `[1, C, H, W]`.
        eta: share of DDPM's noise.
        clip: the clean estimate is held to -clip..clip; None for no limit.
        gated: whether sigma is 0 outside of the mask. LOCATEdit's has DDPM's coefficients everywhere, and noise
            everywhere once there is a mask.
    """
    clean, _ = clean_and_noise(prediction, sample, step.alpha, kind)
    clean = clean_source + (clean - (clean[:1] if source is None else clean[list(source)]))
    if clip is not None:
        clean = clean.clamp(-clip, clip)
    sigma = eta * step.variance**0.5
    if gated:
        sigma = sigma * (torch.zeros(1) if mask is None else mask).to(sample)
    return ddim_step(clean, sample, step, sigma, None if mask is None else noise)


def paste(canvas: Tensor, layer: Tensor, mask: Tensor, *, shift: Sequence[int] = (0, 0), flip: bool = False) -> Tensor:
    """A layer put onto a canvas where its mask is.

    Args:
        canvas, layer: `[B, C, H, W]`.
        mask: of the layer, `[H, W]`, in 0..1.
        shift: rows and columns that the layer moves down and to the right; what leaves the canvas is lost.
        flip: whether the layer is mirrored left to right first.
    """
    mask = mask.to(canvas).expand(1, 1, *canvas.shape[-2:])
    if flip:
        layer, mask = layer.flip(-1), mask.flip(-1)
    height, width = canvas.shape[-2:]
    down, right = shift
    rows = slice(max(down, 0), height + min(down, 0)), slice(max(-down, 0), height + min(-down, 0))
    columns = slice(max(right, 0), width + min(right, 0)), slice(max(-right, 0), width + min(-right, 0))
    out = canvas.clone()
    there, here = (..., rows[0], columns[0]), (..., rows[1], columns[1])
    gate = mask[here]
    mixed = out[there].lerp(layer[here], gate)
    out[there] = torch.where(gate == 1, layer[here], torch.where(gate == 0, out[there], mixed))
    return out


def low_band(x: Tensor, share: float) -> Tensor:
    """Frequencies up to a share of the highest along each axis, a projection; `[B, C, H, W]`."""
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must be in 0..1")
    spectrum = torch.fft.rfft2(x.double())
    rows = torch.fft.fftfreq(x.shape[-2], device=x.device).abs()[:, None] <= share / 2
    columns = torch.fft.rfftfreq(x.shape[-1], device=x.device)[None] <= share / 2
    return torch.fft.irfft2(spectrum * (rows & columns), s=x.shape[-2:]).to(x)


def replace_low_band(x: Tensor, reference: Tensor, share: float, weight: float = 1.0) -> Tensor:
    """`x` with the low band of a reference of its size, by a weight in 0..1."""
    return x + weight * (low_band(reference, share) - low_band(x, share))
