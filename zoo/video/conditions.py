"""Conditions of a call of the pipeline: classes, texts and given frames, wanted and unwanted, for each video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .segments import Segments


@dataclass(frozen=True)
class Texts:
    """Texts of a call as the caller gives them, wanted and unwanted; see `VideoDiTPipeline.__call__`.

    Attributes:
        prompt, negative_prompt: strings, or None.
        prompt_embeds, negative_prompt_embeds: `[B, L, text_dim]`, with segments `[B, segments, L, text_dim]`.
        prompt_attention_mask, negative_prompt_attention_mask: of the embeddings.
        max_sequence_length: tokens of a prompt, with a tokenizer.
        segment_frames: frames of each segment that has a prompt of its own.
    """

    prompt: Any = None
    negative_prompt: Any = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    prompt_attention_mask: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None
    max_sequence_length: int = 226
    segment_frames: Sequence[int] | None = None

    def encoder_arguments(self) -> dict[str, Any]:
        """Arguments of `VideoDiTPipeline.encode_prompt`: all but the segments."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "segment_frames"}


@dataclass(frozen=True)
class Conditions:
    """Conditions of B videos, and the unconditional counterparts that guidance leads away from.

    Attributes:
        class_labels, null_labels: `[B]` int64.
        prompt_embeds, negative_prompt_embeds: `[B, L, text_dim]`.
        prompt_attention_mask, negative_prompt_attention_mask: `[B, L]` bool; None: every token counts.
        segments: frames of the video that each part of the text belongs to.
        first_frames, last_frames: clean frames that each video begins and ends with, `[B, C, frames, H, W]`, as the
            model sees them.
    """

    class_labels: Tensor | None = None
    null_labels: Tensor | None = None
    prompt_embeds: Tensor | None = None
    prompt_attention_mask: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None
    segments: Segments | None = None
    first_frames: Tensor | None = None
    last_frames: Tensor | None = None

    @property
    def videos(self) -> int | None:
        """B; None for unconditional models without first frames."""
        told = (self.class_labels, self.prompt_embeds, self.first_frames)
        return next((len(x) for x in told if x is not None), None)

    @property
    def known(self) -> int:
        """Frames of `first_frames`."""
        return 0 if self.first_frames is None else self.first_frames.shape[2]

    @property
    def known_last(self) -> int:
        """Frames of `last_frames`."""
        return 0 if self.last_frames is None else self.last_frames.shape[2]

    def hold(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, T, H, W]` with the given frames in their places."""
        made = latents[:, :, self.known : latents.shape[2] - self.known_last]
        parts = [x for x in (self.first_frames, made, self.last_frames) if x is not None]
        return torch.cat(parts, dim=2) if len(parts) > 1 else latents

    def timesteps(self, t: Tensor, latents: Tensor, patch: int) -> Tensor:
        """Timesteps `[B]`, or with given frames, which have 0, `[B, T / patch]`; `patch` is that of time."""
        if not self.known and not self.known_last:
            return t.expand(len(latents))
        frames = latents.shape[2] // patch
        timesteps = t.repeat(len(latents), frames)
        timesteps[:, : self.known // patch] = 0
        timesteps[:, frames - self.known_last // patch :] = 0
        return timesteps

    def repeat(self, times: int) -> Conditions:
        """Each row so often, one after the other: several videos of each prompt."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        again = {name: x.repeat_interleave(times, dim=0) for name, x in tensors.items() if isinstance(x, Tensor)}
        return replace(self, **again)

    def sides(self) -> dict[str, dict[str, Any]]:
        """Arguments of the model for classifier-free guidance: "cond" and, where there are counterparts, "uncond"."""
        if self.class_labels is not None:
            labels = {"cond": self.class_labels, "uncond": self.null_labels}
            return {name: {"class_labels": x} for name, x in labels.items() if x is not None}
        texts = {
            "cond": (self.prompt_embeds, self.prompt_attention_mask),
            "uncond": (self.negative_prompt_embeds, self.negative_prompt_attention_mask),
        }
        sides = {
            name: {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
            for name, (embeds, mask) in texts.items()
            if embeds is not None
        }
        return sides or {"cond": {}}

    def shown(self) -> dict[str, Tensor | None]:
        """Tensors that callbacks may see and change, by name."""
        return {"prompt_embeds": self.prompt_embeds, "negative_prompt_embeds": self.negative_prompt_embeds}

    def change(self, returned: Mapping[str, Any]) -> Conditions:
        """Conditions with the embeddings that a callback returned; negative ones count under guidance only.

        Raises:
            ValueError: embeddings for a model that has none, or None in place of embeddings.
        """
        before = self.shown()
        if "uncond" not in self.sides():
            del before["negative_prompt_embeds"]
        after = {name: returned[name] for name in before if name in returned}
        for name, embeds in after.items():
            if (embeds is None) != (before[name] is None):
                raise ValueError(f"callback_on_step_end must return {name} if and only if the model takes text")
        return replace(self, **after) if after else self


def class_conditions(labels: Tensor, null: int, *, guided: bool) -> Conditions:
    """Conditions of labels `[B]`, with the null class as their counterpart under guidance."""
    return Conditions(class_labels=labels, null_labels=torch.full_like(labels, null) if guided else None)


def segment_prompts(prompt: Any, count: int) -> tuple[list[str], int]:
    """Texts of all segments of all videos in one list, and how many videos there are.

    Raises:
        ValueError: a video has not `count` texts.
    """
    videos = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], str) else prompt
    videos = [[texts] if isinstance(texts, str) else texts for texts in videos]
    if any(len(texts) != count for texts in videos):
        raise ValueError(f"prompt={prompt} must have {count} texts for segment_frames")
    return [text for texts in videos for text in texts], len(videos)


def join_segments(
    texts: Texts, embeds: Tensor, mask: Tensor | None, *, ends: Sequence[int], zeros: bool
) -> tuple[Texts, Segments]:
    """Texts whose segments follow each other, `[B, segments * L, text_dim]`, and the frames of each.

    Args:
        texts: of the call.
        embeds, mask: of the segments, `[B, segments, L, text_dim]` and `[B, segments, L]`.
        ends: token frames up to the end of each segment.
        zeros: the null text is zeros; it is as long as one text.
    """
    null = texts.negative_prompt_embeds
    if zeros and texts.negative_prompt is None and null is None:
        null = torch.zeros_like(embeds[:, 0])
    frames = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
    flat = {
        "prompt_embeds": embeds.flatten(1, 2),
        "prompt_attention_mask": None if mask is None else mask.flatten(1, 2),
    }
    joined = replace(texts, prompt=None, negative_prompt_embeds=null, **flat)
    return joined, Segments(frames, (embeds.shape[2],) * len(ends))


def encode_texts(
    encoder: Any, prompts: str | Sequence[str], *, tokenizer: Any, length: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Embeddings `[B, L, text_dim]` of B prompts and which words count, `[B, L]`, None for all."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if tokenizer is not None:
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        mask = tokens.attention_mask.to(device)
        return encoder(tokens.input_ids.to(device), attention_mask=mask)[0], mask
    embeds = encoder(prompts)
    return embeds if isinstance(embeds, tuple) else (embeds, None)


def rows(x: Tensor, *, count: int, times: int, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """One row or `count` rows, each as often as its prompt has videos: `[count * times, ...]`."""
    return x.to(device=device, dtype=dtype).expand(count, *x.shape[1:]).repeat_interleave(times, dim=0)


def mask_rows(name: str, mask: Tensor | None, *, count: int, times: int, device: torch.device) -> Tensor | None:
    """`rows` of a mask, as bool; integers are those that tokenizers return.

    Raises:
        ValueError: a mask of floating-point numbers, which may be one that is added to logits.
    """
    if mask is None:
        return None
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise ValueError(f"{name} has type {mask.dtype}; it must be bool, or integers of 0 and 1")
    return rows(mask, count=count, times=times, device=device, dtype=torch.bool)
