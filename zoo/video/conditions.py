"""What a call of the pipeline conditions its model by: classes or texts, wanted and unwanted, for each video."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

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
    class_labels: int | Sequence[int] | Tensor | None,
    segment_frames: Sequence[int] | None,
    repeats: int,
    device: torch.device,
) -> tuple[dict[str, dict[str, Any]], Segments | None]:
    """Arguments of the model by which it is conditioned, "cond" and, with guidance, "uncond"; and the segments.

    Raises:
        ValueError: labels out of range, prompts and segments or negative prompts that differ in number.
    """
    names = ("cond", "uncond") if pipe.do_classifier_free_guidance else ("cond",)
    if class_labels is not None:
        classes = pipe.transformer.config.num_classes
        labels = torch.as_tensor(class_labels, device=device).reshape(-1)
        if labels.is_floating_point() or labels.min() < 0 or labels.max() > classes:
            raise ValueError(f"class_labels={labels.tolist()} must be integers of 0..{classes}")
        labels = labels.long().repeat_interleave(repeats)
        values = {"cond": labels, "uncond": torch.full_like(labels, classes)}
        return {name: {"class_labels": values[name]} for name in names}, None
    if prompt is None and prompt_embeds is None:
        return {"cond": {}}, None

    encode_all = {"device": device, "max_sequence_length": max_sequence_length}
    embeds, mask = prompt_embeds, prompt_attention_mask
    if embeds is None and segment_frames is None:
        embeds, mask = pipe.encode_prompt(prompt, **encode_all)
    elif embeds is None and segment_frames is not None:
        assert prompt is not None
        count = len(segment_frames)
        videos = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], str) else prompt
        videos = [[texts] if isinstance(texts, str) else texts for texts in videos]
        if any(len(texts) != count for texts in videos):
            raise ValueError(f"prompt={prompt} must have {count} texts for segment_frames")
        embeds, mask = pipe.encode_prompt([text for texts in videos for text in texts], **encode_all)
        embeds = embeds.unflatten(0, (len(videos), -1))  # [B, segments, L, text_dim]
        mask = None if mask is None else mask.unflatten(0, (len(videos), -1))
    assert embeds is not None
    segments = None
    if segment_frames is not None:
        if embeds.ndim != 4 or embeds.shape[1] != len(segment_frames):
            raise ValueError(
                f"prompt_embeds has shape {list(embeds.shape)}, expected [B, {len(segment_frames)}, L, text_dim]"
            )
        ends = [pipe.token_frames(end, "frames up to the end of a segment") for end in accumulate(segment_frames)]
        lengths = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
        segments = Segments(lengths, (embeds.shape[2],) * len(lengths))
        embeds, mask = embeds.flatten(1, 2), None if mask is None else mask.flatten(1, 2)
    conditions = {"cond": _text(pipe, embeds, mask, repeats, device)}
    if "uncond" in names:
        unwanted, unwanted_mask = negative_prompt_embeds, negative_prompt_attention_mask
        if unwanted is None:
            texts = [negative_prompt or ""] if not isinstance(negative_prompt, list) else negative_prompt
            texts = texts * len(embeds) if len(texts) == 1 else texts
            unwanted, unwanted_mask = pipe.encode_prompt(texts, **encode_all)
        if len(unwanted) != len(embeds):
            raise ValueError(f"{len(unwanted)} negative prompts for {len(embeds)} videos; one, or one for each")
        conditions["uncond"] = _text(pipe, unwanted, unwanted_mask, repeats, device)
    return conditions, segments


def _text(pipe: Any, embeds: Tensor, mask: Tensor | None, repeats: int, device: torch.device) -> dict[str, Any]:
    embeds = embeds.to(device=device, dtype=pipe.transformer.dtype).repeat_interleave(repeats, dim=0)
    mask = None if mask is None else mask.to(device).bool().repeat_interleave(repeats, dim=0)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
