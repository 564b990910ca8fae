"""Reading clips out of video files with PyAV: what a file holds, and its frames at given times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm")


class UnreadableVideo(ValueError):
    """A file that holds no video that can be decoded, or too little of it."""


@dataclass(frozen=True)
class VideoInfo:
    """What the header of a file says: frames a second, seconds, pixels."""

    fps: float
    seconds: float
    height: int
    width: int


def _av():
    try:
        import av
    except ImportError as error:
        raise ImportError("video files are read by PyAV: pip install 'foveal[video]'") from error
    return av


def probe(path: Path) -> VideoInfo:
    """Reads the header of a video file.

    Raises:
        UnreadableVideo: it is no video; the message names the file and the reason.
    """
    av = _av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UnreadableVideo(f"{path} holds no video stream")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            if stream.duration is not None and stream.time_base is not None:
                seconds = float(stream.duration * stream.time_base)
            else:
                seconds = (container.duration or 0) / av.time_base
            if not rate or seconds <= 0 or not stream.width:
                raise UnreadableVideo(f"{path} does not say how long or how large it is")
            return VideoInfo(fps=float(rate), seconds=seconds, height=stream.height, width=stream.width)
    except (av.error.FFmpegError, OSError) as error:
        raise UnreadableVideo(f"{path} cannot be opened as a video: {error}") from error


def read_clip(path: Path, *, times: np.ndarray) -> Tensor:
    """The frames shown at `times` seconds after the first one.

    Args:
        path: of the file.
        times: rising, `[T]`.

    Returns:
        uint8 RGB `[3, T, H, W]`.

    Raises:
        UnreadableVideo: decoding fails, or the video ends before the last time.
    """
    av = _av()
    shown: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            zero, base = stream.start_time or 0, float(stream.time_base or 0)
            duration = 1 / float(stream.average_rate or stream.guessed_rate)
            slack = 0.1 * duration  # clocks are rounded
            if times[0] > 1:
                container.seek(zero + int((times[0] - slack) / base), stream=stream)  # the key frame before
            before = None
            for frame in container.decode(stream):
                if frame.pts is None:
                    continue
                now = (frame.pts - zero) * base
                while before is not None and len(shown) < len(times) and times[len(shown)] + slack < now:
                    shown.append(before.to_ndarray(format="rgb24"))
                before = frame
                last = now
                if len(shown) == len(times):
                    break
            while before is not None and len(shown) < len(times) and times[len(shown)] < last + duration + slack:
                shown.append(before.to_ndarray(format="rgb24"))
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise UnreadableVideo(f"{path} cannot be decoded: {error}") from error
    if len(shown) < len(times):
        raise UnreadableVideo(f"{path} ends before second {times[-1]:.2f}")
    return torch.from_numpy(np.stack(shown)).permute(3, 0, 1, 2)


def cover(clip: Tensor, *, height: int, width: int, at: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """Resizes a clip until it covers `height`×`width`, antialiased, and cuts the rest off.

    Args:
        clip: uint8 `[C, T, H, W]`.
        at: where the cut is, down and right, 0 to 1; the middle by default.

    Returns:
        float32 in 0..1, `[C, T, height, width]`.
    """
    scale = max(height / clip.shape[2], width / clip.shape[3])
    size = [max(height, round(clip.shape[2] * scale)), max(width, round(clip.shape[3] * scale))]
    frames = clip.transpose(0, 1).float()  # [T, C, H, W]
    if size != list(clip.shape[2:]):
        frames = F.interpolate(frames, size=size, mode="bilinear", antialias=True)
    y, x = (round(share * (n - m)) for share, n, m in zip(at, size, (height, width), strict=True))
    return (frames[:, :, y : y + height, x : x + width] / 255).clamp(0, 1).transpose(0, 1).contiguous()
