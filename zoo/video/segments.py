"""Several prompts in one video: text i sees, and is seen by, segment i of the video only; the video sees all of itself.

The attention mask of Mask²DiT (arXiv:2503.19881). Its second mask, which keeps earlier scenes clean while the next one
is made, is the timestep 0 that `VideoDiTPipeline` gives to frames it was handed; `extend_scenes` repeats that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ...kernels.ops import merge_attentions, na3d_lse
from .attention import Grid, VideoAttention, VideoAttnProcessor
from .guidance import processors
from .kv_cache import LayerCache
from .positions import rotate

Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Segments:
    """Which words belong to which frames; segments follow each other in the video and in the text.

    Attributes:
        frames: token frames of each segment, together all of the video.
        words: text tokens of each segment, together all of encoder_hidden_states.

    Raises:
        ValueError: not equally many, none, or a segment without frames or words.
    """

    frames: tuple[int, ...]
    words: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.frames) != len(self.words) or not self.frames or min(*self.frames, *self.words) < 1:
            raise ValueError(
                f"segments need frames and words, equally many, at least one each, got frames={self.frames}, "
                f"words={self.words}"
            )

    def pairs(self) -> Iterator[tuple[slice, slice]]:
        """Frames and words of each segment."""
        frame, word = 0, 0
        for frames, words in zip(self.frames, self.words, strict=True):
            yield slice(frame, frame + frames), slice(word, word + words)
            frame, word = frame + frames, word + words

    def check(self, frames: int, words: int) -> None:
        """Raises ValueError unless they cover a video of so many token frames and a text of so many tokens."""
        if sum(self.frames) != frames or sum(self.words) != words:
            raise ValueError(
                f"segments cover {sum(self.frames)} token frames and {sum(self.words)} words, "
                f"the video has {frames} and encoder_hidden_states {words}"
            )

    def mask(self, tokens_per_frame: int, device: torch.device | str | None = None) -> Tensor:
        """The mask over words and then video tokens, bool `[L + S, L + S]`, True is seen. For tests and pictures."""
        text, video = (
            torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))
            for sizes in (self.words, [frames * tokens_per_frame for frames in self.frames])
        )
        owner = torch.cat([text, video])
        is_video = torch.arange(len(owner), device=device) >= len(text)
        return (owner[:, None] == owner) | (is_video[:, None] & is_video)


class SegmentAttnProcessor(VideoAttnProcessor):
    """Attention in which text i and segment i of the video see each other, for "cross" and "joint" models.

    No mask over all pairs is made: a segment attends to its own words, and in joint layers what it sees of the video
    and what it sees of the text are merged by their log-sum-exps.

    Args:
        segments: of the video and of its text.
    """

    def __init__(self, segments: Segments):
        super().__init__()
        self.segments = segments

    def __call__(
        self,
        attn: VideoAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        grid: Grid | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, None, attention_mask, rotary_emb, grid, cache)
        if cache is not None:
            raise NotImplementedError("segments of a video cannot be rolled out with a kv_cache")
        dense = partial(dispatch_attention_fn, backend=self._attention_backend)
        words = encoder_hidden_states.shape[1]
        if attn.is_cross_attention:
            query, key, value = attn.project(hidden_states, encoder_hidden_states)
            frames = sum(self.segments.frames)
            self.segments.check(frames if query.shape[1] % frames == 0 else -1, words)
            out = self._cross(query.unflatten(1, (frames, -1)), key, value, attention_mask, dense)
            return attn.output(out, hidden_states), None

        assert rotary_emb is not None and grid is not None
        self.segments.check(grid[0], words)
        query, key, value = attn.project(hidden_states)
        query, key = (rotate(x, rotary_emb).unflatten(1, grid) for x in (query, key))  # [B, T, H, W, heads, d]
        value = value.unflatten(1, grid)
        text_query, text_key, text_value = attn.project_text(encoder_hidden_states)
        video = na3d_lse(query, key, value, **_window(attn, grid))
        text = self._words_of_video(query, text_key, text_value, attention_mask)
        out = merge_attentions(*zip(video, text, strict=True))[0]
        hidden_states = attn.output(out.flatten(1, 3), hidden_states)
        if text_query is None:
            return hidden_states, None
        seen = []
        for frames, mine in self.segments.pairs():
            keys, values, mask = [text_key[:, mine]], [text_value[:, mine]], None
            if not attn.pattern.causal:  # as in VideoAttnProcessor
                keys.append(key[:, frames].flatten(1, 3))
                values.append(value[:, frames].flatten(1, 3))
            if attention_mask is not None:
                others = sum(x.shape[1] for x in keys[1:])
                mask = torch.nn.functional.pad(attention_mask[:, mine], (0, others), value=True)[:, None, None]
            seen.append(dense(text_query[:, mine], torch.cat(keys, dim=1), torch.cat(values, dim=1), attn_mask=mask))
        return hidden_states, attn.output_text(torch.cat(seen, dim=1))

    def _cross(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dense: Attend) -> Tensor:
        """`[B, T, tokens, heads, d]` to its segments' words, `[B, S, heads, d]`."""
        outs = []
        for frames, words in self.segments.pairs():
            counted = None if mask is None else mask[:, None, None, words]
            outs.append(dense(query[:, frames].flatten(1, 2), key[:, words], value[:, words], attn_mask=counted))
        return torch.cat(outs, dim=1)

    def _words_of_video(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention `[B, T, H, W, heads, d]` of every frame to its segment's words, and its log-sum-exp."""
        accumulate = torch.promote_types(query.dtype, torch.float32)
        outs, lses = [], []
        for frames, words in self.segments.pairs():
            some = query[:, frames].to(accumulate) * query.shape[-1] ** -0.5
            logits = torch.einsum("bthwnd,blnd->bthwnl", some, key[:, words].to(accumulate))
            if mask is not None:
                hidden = torch.finfo(accumulate).min / 2  # finite: without any word -inf would make NaN
                logits = logits.masked_fill(~mask[:, None, None, None, None, words], hidden)
            outs.append(torch.einsum("bthwnl,blnd->bthwnd", logits.softmax(-1), value[:, words].to(accumulate)))
            lses.append(logits.logsumexp(-1))
        return torch.cat(outs, dim=1).to(query.dtype), torch.cat(lses, dim=1)


def _window(attn: VideoAttention, grid: Grid) -> dict[str, Any]:
    """What a layer's queries see of the video, as arguments of `na3d`."""
    if attn.pattern.type == "dense":
        return {"window": tuple(grid), "causal": (attn.pattern.causal, False, False)}
    options, padding = attn.pattern.fit(grid)
    if padding:
        raise NotImplementedError(
            f"segments need a number of token frames that causal windows divide: {padding} are missing to {grid[0]}"
        )
    return options


@contextmanager
def segmented(transformer: Any, segments: Segments) -> Iterator[None]:
    """Inside, a `VideoDiT` takes the texts of all segments, one after the other, as encoder_hidden_states.

    Raises:
        ValueError: the model takes no text.
    """
    if transformer.config.conditioning not in ("cross", "joint"):
        raise ValueError(f"segments need conditioning='cross' or 'joint', not {transformer.config.conditioning!r}")
    with processors(transformer, dict.fromkeys(transformer.attn_processors, SegmentAttnProcessor(segments))):
        yield


def extend_scenes(
    pipe: Any, prompts: Sequence[str], *, frames_per_scene: int, context_frames: int, **arguments: Any
) -> Tensor:
    """A video of several scenes, each made in sight of the end of the one before.

    A later scene is sampled behind the last `context_frames` of the video, which stay clean and keep the prompt they
    were made with as a segment of their own; the new frames have the next prompt.

    Args:
        pipe: a `VideoDiTPipeline` with a text encoder.
        prompts: one for each scene.
        frames_per_scene: frames of each call, for later scenes the context included.
        context_frames: last frames that the next scene sees; both must fill whole patches and latents of the model.
        arguments: for every call of the pipeline, such as guidance_scale and generator.

    Returns:
        `[1, frames, C, H, W]` in 0..1; every scene after the first adds frames_per_scene - context_frames.

    Raises:
        ValueError: no prompts, or context that leaves no frame to a scene.
    """
    if not prompts or not 0 < context_frames < frames_per_scene:
        raise ValueError(
            f"prompts={list(prompts)} must not be empty and context_frames={context_frames} at least 1 and less than "
            f"frames_per_scene={frames_per_scene}"
        )
    arguments = arguments | {"output_type": "pt"}
    video = pipe(prompt=prompts[0], num_frames=frames_per_scene, **arguments).frames
    for before, prompt in pairwise(prompts):
        scene = pipe(
            prompt=[before, prompt],
            segment_frames=[context_frames, frames_per_scene - context_frames],
            video=video[:, -context_frames:],
            num_frames=frames_per_scene,
            **arguments,
        ).frames
        video = torch.cat([video, scene[:, context_frames:]], dim=1)
    return video
