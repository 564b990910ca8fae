"""Guiders of diffusers (`diffusers.guiders`) in place of the pipeline's own guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.hooks import LayerSkipConfig
from torch import Tensor

SIDES = {"pred_cond": "cond", "pred_uncond": "uncond"}  # names of predictions there and here


def check_guider(guider: Any, *, conditioning: str | None, layers: int, others: dict[str, float]) -> None:
    """Refuses what is no guider, and guiders that a `VideoDiT` has nothing for.

    Args:
        guider: of the call.
        conditioning: of the model.
        layers: of the model.
        others: arguments of the call that a guider replaces and their values; all must be 0.

    Raises:
        ValueError: names the argument, what it is and what is accepted.
    """
    said = f"guider={type(guider).__name__}"
    if not isinstance(guider, BaseGuidance):
        raise ValueError(f"{said} must be a guider of diffusers, such as diffusers.ClassifierFreeGuidance")
    if conditioning is None:
        raise ValueError(f"{said} needs a model of classes or texts")
    for name, value in others.items():
        if value:
            raise ValueError(f"{name}={value} and {said} are both guidance: give one of them")
    unknown = [name for name in type(guider)._input_predictions or [] if name not in (*SIDES, "pred_cond_skip")]
    if unknown:
        raise ValueError(f"{said} wants {', '.join(unknown)}, which a VideoDiT does not predict")
    for config in _skipped(guider):
        if not isinstance(config, LayerSkipConfig) or not (config.skip_attention and config.skip_ff):
            raise ValueError(
                f"{said} changes the attention of layers, which is not diffusers' here: pag_scale and pag_heads do "
                "that; whole layers can be skipped, by SkipLayerGuidance or AutoGuidance"
            )
        if isinstance(config.indices, int):  # as guiders keep it of layers=[1]; their hooks want a list
            config.indices = [config.indices]
        if outside := [index for index in config.indices if not 0 <= index < layers]:
            raise ValueError(f"{said} skips layers {outside}, and the model has {layers}")


def _skipped(guider: Any) -> list[Any]:
    """What a guider does to layers, in its own words."""
    for name in ("skip_layer_config", "auto_guidance_config", "seg_guidance_config"):
        if (configs := getattr(guider, name, None)) is not None:
            return list(configs)
    return []


def guided(
    guider: Any, predict: Callable[[str, str], Tensor], *, transformer: Any, step: int, steps: int, timestep: Tensor
) -> Tensor:
    """The prediction that a guider makes of those it asks for.

    Args:
        guider: see `check_guider`.
        predict: called with the name of a prediction and a side, "cond" or "uncond".
        transformer: that the guider may change for a prediction.
        step, steps, timestep: where in sampling, counted from the first step that is taken.
    """
    guider.set_state(step=step, num_inference_steps=steps, timestep=timestep)
    wanted = guider.prepare_inputs({"side": ("cond", "uncond")})
    for one in wanted:
        name = getattr(one, guider._identifier_key)
        guider.prepare_models(transformer)
        try:
            one.noise_pred = predict(SIDES.get(name, name), one.side)
        finally:
            guider.cleanup_models(transformer)
    return guider(wanted).pred
