"""Checks of a call of the pipeline, one function a subject; each error names the argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

from .conditions import Texts
from .export import SUFFIXES, check_path
from .transformer import VideoDiT

OUTPUT_TYPES = ("np", "pt", "pil", "gif", "mp4", "latent")


def check_counts(steps: int, videos: int, sigmas: Sequence[float] | None, fps: float) -> None:
    """Raises ValueError, naming the argument, unless there are steps, videos and frames a second, and sigmas fall."""
    for name, value in (("num_inference_steps", steps), ("num_videos_per_prompt", videos)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value} must be an integer of at least 1")
    if sigmas is not None:
        levels = [float(level) for level in sigmas]
        if not levels or not all(1 >= a >= b >= 0 for a, b in zip(levels, [*levels[1:], 0.0], strict=True)):
            raise ValueError(f"sigmas={levels} must hold at least one noise level and fall within 1..0")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps={fps} must be more than 0")


def check_size(height: int, width: int, *, space: int, patch: Sequence[int]) -> None:
    """Raises ValueError, naming the argument, unless a picture fills latents of `space` pixels a side and patches."""
    for name, value, size in (("height", height, patch[1]), ("width", width, patch[2])):
        multiple = space * size
        if value < 1 or value % multiple:
            raise ValueError(f"{name}={value} must be a multiple of {multiple}")


def check_output(output_type: str, output_path: Any, callback_inputs: Sequence[str], *, accepted: list[str]) -> None:
    """Raises ValueError, naming the argument, unless videos and the tensors of callbacks can be had as asked."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} must be one of {OUTPUT_TYPES}")
    if output_type in SUFFIXES:
        check_path(output_path, output_type)  # before an hour of sampling, not after
    unknown = set(callback_inputs) - set(accepted)
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs has {sorted(unknown)}, accepted are {accepted}")


def check_told(
    texts: Texts, class_labels: Any, *, conditioning: str | None, encoder: bool, null_text: str, guidance: str | None
) -> None:
    """Raises ValueError, naming the argument, unless texts or classes are what the model takes.

    Args:
        texts, class_labels: of the call.
        conditioning: of the model.
        encoder: there is a text encoder.
        null_text: of the pipeline.
        guidance: the argument that leads away from the null text, and its value; None: nothing does.
    """
    takes_text, segments = conditioning in ("cross", "joint"), texts.segment_frames
    if (class_labels is not None) != (conditioning == "class"):
        raise ValueError(f"class_labels must be given for a model of classes, and only then; it has {conditioning!r}")
    for name, value, embeds in (
        ("prompt", texts.prompt, texts.prompt_embeds),
        ("negative_prompt", texts.negative_prompt, texts.negative_prompt_embeds),
    ):
        if value is not None and embeds is not None:
            raise ValueError(f"{name} and {name}_embeds must not be given both")
        if not takes_text and (value is not None or embeds is not None):
            raise ValueError(f"{name} needs a model of texts; conditioning={conditioning!r}")
        if value is not None:
            _check_texts(name, value, nested=name == "prompt" and segments is not None)
        if value is not None and not encoder:
            raise ValueError(f"{name} needs a text_encoder, which this pipeline lacks: give {name}_embeds")
    _check_embeds("prompt", texts.prompt_embeds, texts.prompt_attention_mask, segments)
    _check_embeds("negative_prompt", texts.negative_prompt_embeds, texts.negative_prompt_attention_mask, None)
    if takes_text and texts.prompt is None and texts.prompt_embeds is None:
        raise ValueError("prompt or prompt_embeds must be given")
    null_is_known = encoder or null_text == "zeros"
    if takes_text and guidance and texts.negative_prompt_embeds is None and not null_is_known:
        raise ValueError(
            f"{guidance} needs negative_prompt_embeds, a text_encoder for the empty prompt, "
            "or a pipeline of null_text='zeros'"
        )


def check_frames(
    image: Any,
    last_image: Any,
    video: Any,
    segment_frames: Sequence[int] | None,
    chunk_frames: int | None,
    *,
    num_frames: int,
    token_frames: int,
    transformer: VideoDiT,
) -> None:
    """Raises ValueError, naming the argument, unless given frames, segments and chunks fit the video and the model."""
    if image is not None and video is not None:
        raise ValueError("image and video must not be given both: image is the first frame, video several")
    if last_image is not None and transformer.is_causal:
        raise ValueError("last_image needs a model that sees later frames; the layers of this one are causal in time")
    if segment_frames is not None:
        conditioning = transformer.config.conditioning
        if conditioning not in ("cross", "joint"):
            raise ValueError(f"segment_frames needs a model of texts; conditioning={conditioning!r}")
        if sum(segment_frames) != num_frames:
            raise ValueError(f"segment_frames={list(segment_frames)} must add up to num_frames={num_frames}")
    if chunk_frames is not None:
        if not transformer.is_causal:
            raise ValueError(f"chunk_frames={chunk_frames} needs a model whose layers are all causal in time")
        if not 1 <= chunk_frames <= token_frames:
            raise ValueError(f"chunk_frames={chunk_frames} must be in 1..{token_frames}, the frames of tokens")


def check_strength(
    strength: float | None, video: Any, last_image: Any, chunk_frames: int | None, guidance_rescale: float
) -> None:
    """Raises ValueError, naming the argument, unless a video is there to change, in one go."""
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale={guidance_rescale} must be in 0..1")
    if strength is None:
        return
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must be more than 0 and at most 1")
    if video is None or last_image is not None or chunk_frames is not None:
        raise ValueError(f"strength={strength} changes a video: give video, without last_image and chunk_frames")


def _check_texts(name: str, value: Any, *, nested: bool) -> None:
    """A string or strings; nested: those of segments, of one video or of each."""
    texts = [value] if isinstance(value, str) else value
    if nested and isinstance(texts, list):
        texts = [text for some in texts for text in (some if isinstance(some, list) else [some])]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}={value!r} must be a string or a list of at least one string")


def _check_embeds(name: str, embeds: Tensor | None, mask: Tensor | None, segments: Sequence[int] | None) -> None:
    if mask is not None and embeds is None:
        raise ValueError(f"{name}_attention_mask belongs to {name}_embeds, which is not given")
    expected = "[B, L, text_dim]" if segments is None else f"[B, {len(segments)}, L, text_dim]"
    if embeds is not None and (
        embeds.ndim != (3 if segments is None else 4) or (segments is not None and embeds.shape[1] != len(segments))
    ):
        raise ValueError(f"{name}_embeds has shape {list(embeds.shape)}, expected {expected}")
    if embeds is not None and mask is not None and mask.shape != embeds.shape[:-1]:
        raise ValueError(
            f"{name}_attention_mask has shape {list(mask.shape)}, expected {list(embeds.shape[:-1])}, "
            f"that of {name}_embeds"
        )
