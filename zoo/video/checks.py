"""What a call of the pipeline must fulfil; each error names the argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .export import SUFFIXES, check_path
from .guidance import Heads, check_heads

OUTPUT_TYPES = ("np", "pt", "pil", "gif", "mp4", "latent")


def check_call(
    pipe: Any,
    *,
    prompt: Any,
    negative_prompt: Any,
    prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    class_labels: Any,
    image: Any,
    video: Any,
    height: int,
    width: int,
    num_frames: int,
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
        if value is not None and not isinstance(value, str | list):
            raise ValueError(f"{name} must be a string or a list of strings, got {type(value).__name__}")
        if value is not None and pipe.text_encoder is None:
            raise ValueError(f"{name} needs a text_encoder, which this pipeline lacks: give {name}_embeds")
    if texts and prompt is None and prompt_embeds is None:
        raise ValueError("prompt or prompt_embeds must be given")
    if texts and pipe.do_classifier_free_guidance and pipe.text_encoder is None and negative_prompt_embeds is None:
        raise ValueError(
            f"guidance_scale={pipe._guidance_scale} needs negative_prompt_embeds, "
            "or a text_encoder for the empty prompt"
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
