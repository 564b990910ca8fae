"""What a call of the pipeline must fulfil; each error names the argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

from .export import SUFFIXES, check_path
from .guidance import Heads, check_heads
from .stepping import check_scheduler

OUTPUT_TYPES = ("np", "pt", "pil", "gif", "mp4", "latent")


def check_call(
    pipe: Any,
    *,
    prompt: Any,
    negative_prompt: Any,
    prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    prompt_attention_mask: Tensor | None,
    negative_prompt_attention_mask: Tensor | None,
    class_labels: Any,
    image: Any,
    video: Any,
    height: int,
    width: int,
    num_frames: int,
    num_inference_steps: int,
    num_videos_per_prompt: int,
    sigmas: Sequence[float] | None,
    fps: float,
    segment_frames: Sequence[int] | None,
    chunk_frames: int | None,
    pag_scale: float,
    pag_heads: Heads | None,
    pag_strength: float,
    output_type: str,
    output_path: Any,
    callback_on_step_end_tensor_inputs: Sequence[str],
) -> None:
    """Raises ValueError, naming the argument, unless the call fits the model and itself."""
    check_scheduler(pipe.scheduler)
    _check_counts(num_inference_steps, num_videos_per_prompt, sigmas, fps)
    conditioning, patch = pipe.transformer.config.conditioning, pipe.transformer.config.patch_size
    for name, value, size in (("height", height, patch[1]), ("width", width, patch[2])):
        multiple = pipe.latent_space.space * size
        if value < 1 or value % multiple:
            raise ValueError(f"{name}={value} must be a multiple of {multiple}")
    frames = pipe.token_frames(num_frames, "num_frames")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} must be one of {OUTPUT_TYPES}")
    if output_type in SUFFIXES:
        check_path(output_path, output_type)  # before an hour of sampling, not after
    unknown = set(callback_on_step_end_tensor_inputs) - set(pipe._callback_tensor_inputs)
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs has {sorted(unknown)}, accepted are {pipe._callback_tensor_inputs}"
        )

    texts = conditioning in ("cross", "joint")
    if (class_labels is not None) != (conditioning == "class"):
        raise ValueError(f"class_labels must be given for a model of classes, and only then; it has {conditioning!r}")
    for name, value, embeds in (
        ("prompt", prompt, prompt_embeds),
        ("negative_prompt", negative_prompt, negative_prompt_embeds),
    ):
        if value is not None and embeds is not None:
            raise ValueError(f"{name} and {name}_embeds must not be given both")
        if not texts and (value is not None or embeds is not None):
            raise ValueError(f"{name} needs a model of texts; conditioning={conditioning!r}")
        if value is not None:
            _check_texts(name, value, nested=name == "prompt" and segment_frames is not None)
        if value is not None and pipe.text_encoder is None:
            raise ValueError(f"{name} needs a text_encoder, which this pipeline lacks: give {name}_embeds")
    _check_embeds("prompt", prompt_embeds, prompt_attention_mask, segment_frames)
    _check_embeds("negative_prompt", negative_prompt_embeds, negative_prompt_attention_mask, None)
    if texts and prompt is None and prompt_embeds is None:
        raise ValueError("prompt or prompt_embeds must be given")
    null_is_known = pipe.text_encoder is not None or pipe.config.null_text == "zeros"
    if texts and pipe.do_classifier_free_guidance and negative_prompt_embeds is None and not null_is_known:
        raise ValueError(
            f"guidance_scale={pipe._guidance_scale} needs negative_prompt_embeds, a text_encoder for the empty prompt, "
            "or a pipeline of null_text='zeros'"
        )

    if image is not None and video is not None:
        raise ValueError("image and video must not be given both: image is the first frame, video several")
    if segment_frames is not None:
        if not texts:
            raise ValueError(f"segment_frames needs a model of texts; conditioning={conditioning!r}")
        if sum(segment_frames) != num_frames:
            raise ValueError(f"segment_frames={list(segment_frames)} must add up to num_frames={num_frames}")
    if chunk_frames is not None:
        if not pipe.transformer.is_causal:
            raise ValueError(f"chunk_frames={chunk_frames} needs a model whose layers are all causal in time")
        if not 1 <= chunk_frames <= frames:
            raise ValueError(f"chunk_frames={chunk_frames} must be in 1..{frames}, the frames of tokens")
    if pag_scale and not pag_heads:
        raise ValueError(f"pag_scale={pag_scale} needs pag_heads, layer -> heads")
    check_heads(pipe.transformer, pag_heads or {}, pag_strength)


def _check_counts(steps: int, videos: int, sigmas: Sequence[float] | None, fps: float) -> None:
    for name, value in (("num_inference_steps", steps), ("num_videos_per_prompt", videos)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value} must be an integer of at least 1")
    if sigmas is not None:
        levels = [float(level) for level in sigmas]
        if not levels or not all(1 >= a >= b >= 0 for a, b in zip(levels, [*levels[1:], 0.0], strict=True)):
            raise ValueError(f"sigmas={levels} must hold at least one noise level and fall within 1..0")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps={fps} must be more than 0")


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
