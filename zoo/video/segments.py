"""Several prompts in one video: text i sees, and is seen by, segment i of the video only; the video sees all of itself.

The attention mask of Mask²DiT (arXiv:2503.19881). Its second mask, which keeps earlier scenes clean while the next one
is made, is the timestep 0 that `VideoDiTPipeline` gives to frames it was handed; `extend_scenes` repeats that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from .attention import VideoAttention, VideoAttnProcessor
from .guidance import processors
from .pattern import Text


@dataclass(frozen=True)
class Segments:
    """Assignment of text tokens to frames; segments follow each other in the video and in the text.

    Attributes:
        frames: token frames of each segment, together all of the video; 0 for a segment that a chunk does not show.
        words: text tokens of each segment, together all of encoder_hidden_states.

    Raises:
        ValueError: not equally many, no frames, or a segment without words.
    """

    frames: tuple[int, ...]
    words: tuple[int, ...]

    def __post_init__(self) -> None:
        counted = self.frames and min(self.frames) >= 0 and max(self.frames) > 0 and min(self.words, default=0) > 0
        if len(self.frames) != len(self.words) or not counted:
            raise ValueError(
                f"segments need frames and at least one word each, equally many, got frames={self.frames}, "
                f"words={self.words}"
            )

    def pairs(self) -> Iterator[tuple[slice, slice]]:
        """Frames and words of each segment."""
        frame, word = 0, 0
        for frames, words in zip(self.frames, self.words, strict=True):
            yield slice(frame, frame + frames), slice(word, word + words)
            frame, word = frame + frames, word + words

    def shown(self) -> Iterator[tuple[slice, slice]]:
        """As `pairs`, of the segments that have frames."""
        return ((frames, words) for frames, words in self.pairs() if frames.start < frames.stop)

    def between(self, first: int, last: int) -> Segments:
        """The segments of the chunk of frames first to last - 1, whose others have no frames in it."""
        ends = list(accumulate(self.frames))
        cut = (min(end, last) - max(end - count, first) for end, count in zip(ends, self.frames, strict=True))
        return Segments(tuple(max(count, 0) for count in cut), self.words)

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

    No mask over all pairs is made: a segment attends to its own words, and in joint layers other than dense what it
    sees of the video and what it sees of the text are merged by their log-sum-exps.

    Args:
        segments: of the video, or of the chunk of a rollout, and of its text.
        inner: the processor that attends; the plain one when None.
    """

    def __init__(self, segments: Segments, inner: VideoAttnProcessor | None = None):
        super().__init__()
        self.segments, self.inner = segments, inner or VideoAttnProcessor()

    def cross(self, query: Tensor, text: Text) -> Tensor:
        if text.mask is not None and text.mask.dim() == 3:
            raise ValueError("encoder_attention_mask [B, tokens, L] and segments both say which words a token sees")
        frames = sum(self.segments.frames)
        self.segments.check(frames if query.shape[1] % frames == 0 else -1, text.key.shape[1])
        query = query.unflatten(1, (frames, -1))  # [B, T, tokens, heads, d]
        parts = [(query[:, mine].flatten(1, 2), text.part(words)) for mine, words in self.segments.shown()]
        return torch.cat([self.inner.cross(*part) for part in parts], dim=1)

    def see(self, attn: VideoAttention, query: Tensor, key: Tensor, value: Tensor, text: Text | None) -> Tensor:
        if text is not None:
            self.segments.check(query.shape[1], text.key.shape[1])
            text = Text(text.key, text.value, text.mask, tuple(self.segments.shown()))
        return self.inner.see(attn, query, key, value, text)

    def read(self, attn: VideoAttention, query: Tensor, text: Text, key: Tensor, value: Tensor) -> Tensor:
        parts = [
            self.inner.read(attn, query[:, words], text.part(words), key[:, frames], value[:, frames])
            for frames, words in self.segments.pairs()
        ]
        return torch.cat(parts, dim=1)


@contextmanager
def segmented(transformer: Any, segments: Segments) -> Iterator[None]:
    """Inside, a `VideoDiT` takes the texts of all segments, one after the other, as encoder_hidden_states.

    Raises:
        ValueError: the model takes no text.
    """
    if transformer.config.conditioning not in ("cross", "joint"):
        raise ValueError(f"segments need conditioning='cross' or 'joint', not {transformer.config.conditioning!r}")
    with processors(transformer, lambda name, inner: SegmentAttnProcessor(segments, inner)):
        yield


def extend_scenes(
    pipe: Callable[..., Any], prompts: Sequence[str], *, frames_per_scene: int, context_frames: int, **arguments: Any
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
