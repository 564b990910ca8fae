"""Clips of videos: which frames, how they are cut, and what takes the place of videos that cannot be decoded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from .buckets import nearest_bucket
from .clips import EndsEarly, UnreadableVideo, VideoInfo, cover, read_clip
from .foreign import about
from .video import Item
from .videofiles import Video

SLACK = 1e-3  # seconds that a video may be too short by: clocks are rounded
TRIES = 20  # files in a row that may fail to decode before training stops


def frame_gap(options: dict[str, Any], info: VideoInfo) -> float:
    """Seconds between two frames of a clip."""
    return options["stride"] / (options["fps"] or info.fps)


def fit_clip(options: dict[str, Any], info: VideoInfo) -> dict[str, Any]:
    """Options of the clip of a video: of `frames` the most that it is long enough for (else the fewest), and as `size`
    that of `sizes` whose aspect ratio is nearest."""
    counts = sorted(options["frames"], reverse=True)
    clips = [{**options, "frames": count} for count in counts]
    clip = next((clip for clip in clips if clip_room(clip, info) >= -SLACK), clips[-1])
    return clip | {"size": options["sizes"][nearest_bucket(info.height, info.width, options["sizes"])]}


def clip_room(options: dict[str, Any], info: VideoInfo) -> float:
    """Seconds by which the last frame of a video comes after that of a clip from its beginning; negative: too short."""
    return info.seconds - 1 / info.fps - (options["frames"] - 1) * frame_gap(options, info)


def too_short(path: Path, options: dict[str, Any], info: VideoInfo) -> str | None:
    """The reason why no clip fits a video; None if one does."""
    room = clip_room(options, info)
    if room < -SLACK:
        return f"{path} lasts {info.seconds:.2f} s, and a clip {info.seconds - room:.2f} s"
    return None


def measured(video: Video, early: EndsEarly, options: dict[str, Any]) -> VideoInfo:
    """The facts of a video that ended before its header says.

    Raises:
        UnreadableVideo: it is too short for a clip.
    """
    assert video.info is not None
    info = replace(video.info, seconds=early.seconds)
    short = too_short(video.path, options, info)
    if short or info.seconds >= video.info.seconds:
        raise UnreadableVideo(short or str(early)) from early
    return info


class ClipDataset(Dataset):
    """A clip of each video: at a random time and place in training, in the middle otherwise.

    Videos whose facts are known go to buckets, one for each number of frames and size.

    A video that turns out to be undecodable is named in the item's `broken`. In training the next one of its size takes
    its place; elsewhere the item does not count: its clip is empty and its `real` False.
    """

    def __init__(self, videos: list[Video], *, options: dict[str, Any], training: bool):
        self.videos, self.training = videos, training
        self.clips = [fit_clip(options, video.info) for video in videos if video.info is not None]
        shapes = [self.shape(index) for index in range(len(videos))]
        number = {shape: i for i, shape in enumerate(sorted(set(shapes)))}
        self.buckets = buckets = [number[shape] for shape in shapes]
        self.peers: dict[int, list[int]] = {bucket: [] for bucket in set(buckets)}
        self.places: list[int] = []  # of every video among its peers
        for index, bucket in enumerate(buckets):
            self.places.append(len(self.peers[bucket]))
            self.peers[bucket].append(index)

    def __len__(self) -> int:
        return len(self.videos)

    def shape(self, index: int) -> tuple[int, ...]:
        """Of a clip, `(3, T, H, W)`."""
        return 3, self.clips[index]["frames"], *self.clips[index]["size"]

    def times(self, clip: dict[str, Any], info: VideoInfo) -> np.ndarray:
        """Seconds of the frames of a clip, `[T]`."""
        start = max(0.0, clip_room(clip, info)) * (float(torch.rand(())) if self.training else 0.5)
        return start + frame_gap(clip, info) * np.arange(clip["frames"])

    def _frames(self, index: int) -> Tensor:
        """uint8 `[3, T, H, W]` of one clip."""
        video, clip = self.videos[index], self.clips[index]
        assert video.info is not None
        try:
            return read_clip(video.path, times=self.times(clip, video.info))
        except EndsEarly as early:
            return read_clip(video.path, times=self.times(clip, measured(video, early, clip)))

    def _item(self, index: int, clip: Tensor) -> Item:
        video = self.videos[index]
        item: Item = {"video": clip, "label": video.label, "caption": video.caption}
        if video.embedding is not None:
            item |= read_embedding(video.embedding, length=self.clips[index]["text_length"])
        return item

    def _read(self, index: int) -> Item:
        frames, (height, width) = self._frames(index), self.clips[index]["size"]
        at = torch.rand(2).tolist() if self.training else (0.5, 0.5)
        clip = 2 * cover(frames, height=height, width=width, at=tuple(at)) - 1
        if self.training and self.clips[index]["flip"] and torch.rand(()) < 0.5:
            clip = clip.flip(-1)
        return self._item(index, clip)

    def __getitem__(self, index: int) -> Item:
        broken: list[str] = []
        peers, place = self.peers[self.buckets[index]], self.places[index]
        for attempt in range(min(TRIES, len(peers)) if self.training else 1):
            try:
                item = self._read(peers[(place + attempt) % len(peers)])
            except UnreadableVideo as error:
                broken.append(str(error))
                continue
            return {**item, "real": True, "broken": "\n".join(broken)}
        if self.training:
            raise ValueError(f"{len(broken)} videos in a row cannot be decoded, the first: {broken[0]}")
        return {**self._item(index, torch.zeros(self.shape(index))), "real": False, "broken": broken[0]}


def read_embedding(path: Path, *, length: int) -> dict[str, Tensor]:
    """`text` `[length, D]` and `text_mask` `[length]` from a safetensors file with `text` `[L, D]`, cut or padded.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    with about("embedding", path, SafetensorError, OSError), safe_open(path, framework="pt") as file:
        text = file.get_tensor("text")[:length].float()
    mask = torch.arange(length) < len(text)
    return {"text": torch.cat([text, text.new_zeros(length - len(text), text.shape[1])]), "text_mask": mask}
