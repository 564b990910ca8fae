"""What a call of the pipeline conditions its model by: classes or texts, wanted and unwanted, for each video."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .labels import read_labels
from .segments import Segments


def prepare_conditions(
    pipe: Any,
    *,
    prompt: Any,
    prompt_embeds: Tensor | None,
    prompt_attention_mask: Tensor | None,
    negative_prompt: str | list[str] | None,
    negative_prompt_embeds: Tensor | None,
    negative_prompt_attention_mask: Tensor | None,
    max_sequence_length: int,
    class_labels: int | str | Sequence[int | str] | Tensor | None,
    segment_frames: Sequence[int] | None,
    repeats: int,
    device: torch.device,
) -> tuple[dict[str, dict[str, Any]], Segments | None]:
    """Arguments of the model by which it is conditioned, "cond" and, with guidance, "uncond"; and the segments.

    Raises:
        ValueError: labels out of range or unknown, prompts and segments or negative prompts that differ in number.
    """
    names = ("cond", "uncond") if pipe.do_classifier_free_guidance else ("cond",)
    if class_labels is not None:
        classes = pipe.transformer.config.num_classes
        labels = read_labels(class_labels, labels=pipe.labels, num_classes=classes, device=device)
        labels = labels.repeat_interleave(repeats)
        values = {"cond": labels, "uncond": torch.full_like(labels, classes)}
        return {name: {"class_labels": values[name]} for name in names}, None
    if prompt is None and prompt_embeds is None:
        return {"cond": {}}, None

    segments = None
    if segment_frames is not None:
        prompt_embeds, prompt_attention_mask, segments = _segments(
            pipe, prompt, prompt_embeds, prompt_attention_mask, segment_frames, max_sequence_length, device
        )  # [B, segments, L, text_dim]
        if negative_prompt is None and negative_prompt_embeds is None and pipe.config.null_text == "zeros":
            negative_prompt_embeds = torch.zeros_like(prompt_embeds[:, 0])  # of one text's length
        prompt, prompt_embeds = None, prompt_embeds.flatten(1, 2)
        prompt_attention_mask = None if prompt_attention_mask is None else prompt_attention_mask.flatten(1, 2)
    embeds, mask, unwanted, unwanted_mask = pipe.encode_prompt(
        prompt,
        negative_prompt,
        do_classifier_free_guidance="uncond" in names,
        num_videos_per_prompt=repeats,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        prompt_attention_mask=prompt_attention_mask,
        negative_prompt_attention_mask=negative_prompt_attention_mask,
        max_sequence_length=max_sequence_length,
        device=device,
    )
    sides = {"cond": (embeds, mask), "uncond": (unwanted, unwanted_mask)}
    conditions = {
        name: {"encoder_hidden_states": sides[name][0], "encoder_attention_mask": sides[name][1]} for name in names
    }
    return conditions, segments


def _segments(
    pipe: Any,
    prompt: Any,
    embeds: Tensor | None,
    mask: Tensor | None,
    segment_frames: Sequence[int],
    length: int,
    device: torch.device,
) -> tuple[Tensor, Tensor | None, Segments]:
    """Texts of segments, `[B, segments, L, text_dim]` and `[B, segments, L]`, and which frames are theirs."""
    count = len(segment_frames)
    if embeds is None:
        videos = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], str) else prompt
        videos = [[texts] if isinstance(texts, str) else texts for texts in videos]
        if any(len(texts) != count for texts in videos):
            raise ValueError(f"prompt={prompt} must have {count} texts for segment_frames")
        embeds, mask, _, _ = pipe.encode_prompt(
            [text for texts in videos for text in texts],
            do_classifier_free_guidance=False,
            max_sequence_length=length,
            device=device,
        )
        assert embeds is not None
        embeds = embeds.unflatten(0, (len(videos), -1))
        mask = None if mask is None else mask.unflatten(0, (len(videos), -1))
    ends = [pipe.token_frames(end, "frames up to the end of a segment") for end in accumulate(segment_frames)]
    lengths = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
    return embeds, mask, Segments(lengths, (embeds.shape[2],) * count)


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
