"""Reading clips out of video files with PyAV: facts of a file, and its frames at given times.

Whatever the decoder raises at a file becomes `UnreadableVideo` here, with the path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pixels import cover
from .folders import SUFFIXES as IMAGE_SUFFIXES
from .foreign import reason
from .pixels import UnreadableImage, read_image

__all__ = ["PICTURES", "SUFFIXES", "EndsEarly", "UnreadableVideo", "VideoInfo", "cover", "probe", "read_clip"]

SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm")


PICTURES = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in SUFFIXES)  # videos of one frame


class UnreadableVideo(ValueError):
    """A file that holds no video that can be decoded, or too little of it."""


class EndsEarly(UnreadableVideo):
    """A video whose last frame comes before the time that was asked for.

    Attributes:
        seconds: how long it really is; None after unpickling, which keeps the message only.
    """

    seconds: float | None = None


@dataclass(frozen=True)
class VideoInfo:
    """Facts of a file.

    Attributes:
        fps: frames a second.
        seconds: from the first frame to the end of the last.
        height, width: of the frames as they are to be shown.
        turned: whether stored frames are to be transposed, then flipped upside down, then left to right, to be shown.
        stretched: height and width that stored frames are resized to before they are turned, because their pixels are
            not square; None where they are.
    """

    fps: float
    seconds: float
    height: int
    width: int
    turned: tuple[bool, bool, bool] = (False, False, False)
    stretched: tuple[int, int] | None = None


@contextmanager
def _opened(path: Path, doing: str) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; no exception of the decoder passes.

    Raises:
        UnreadableVideo: naming the file, what could not be done with it and why.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("video files are read by PyAV: pip install 'foveal[video]'") from error
    try:
        with av.open(str(path), metadata_errors="replace") as container:  # titles in any encoding do no harm
            stream = container.streams.best("video")  # not the picture of a cover
            if stream is None or stream.codec_context is None:
                raise UnreadableVideo(f"{path} holds no video of a codec that FFmpeg knows")
            yield container, stream
    except UnreadableVideo:
        raise
    except Exception as error:  # FFmpeg's own errors, and PyAV's ValueError, AttributeError, MemoryError, …
        raise UnreadableVideo(
            f"{path} cannot be {doing}: {getattr(error, 'strerror', None) or reason(error)}"
        ) from error


def _rate(path: Path, stream: Any) -> float:
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    if rate <= 0 or not stream.time_base:
        raise UnreadableVideo(f"{path} does not say how many frames a second it has")
    return rate


def _ticks(container: Any, item: Any) -> int | None:
    """Time of a frame or packet in the stream's units; of AVI that of decoding, since it stores no times of showing."""
    if container.format.name == "avi" or item.pts is None:
        return item.dts
    return item.pts


def _seek(container: Any, stream: Any, ticks: float) -> Iterator[Any]:
    """Goes to the last key frame up to `ticks` after the stream's start, or the last of all; returns the packets."""
    container.seek((stream.start_time or 0) + int(ticks), stream=stream)
    return container.demux(stream)


def _seconds(container: Any, stream: Any, fps: float) -> float:
    """From the start of the stream to the end of its last packet.

    Headers state the length of the longest stream (Matroska), an estimate (MPEG), or of what was cut off later.
    """
    base = float(stream.time_base)
    beyond = 2 * (container.duration or 0) / 1e6 / base
    for ticks in (beyond, 0):  # a file whose index lies has no packets behind its last key frame
        times = [
            (start, packet.duration or 1 / (fps * base))
            for packet in _seek(container, stream, ticks)
            if packet.size and not packet.is_discard and (start := _ticks(container, packet)) is not None
        ]
        if times:
            return (max(start + length for start, length in times) - (stream.start_time or 0)) * base
    return 0.0


def _orientation(frame: Any) -> tuple[bool, bool, bool]:
    """`VideoInfo.turned` of a frame.

    The display matrix of a container maps places of the picture to places of the screen; angles between quarter turns
    are taken to the nearest.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            matrix = np.frombuffer(bytes(data), dtype=np.int32).reshape(3, 3).astype(np.int64)
            (right_x, right_y), (down_x, down_y) = matrix[:2, :2]  # where steps to the right and down go
            if abs(right_y) + abs(down_x) > abs(right_x) + abs(down_y):
                return True, bool(right_y < 0), bool(down_x < 0)
            return False, bool(down_y < 0), bool(right_x < 0)
    return False, False, False


def _stretched(stream: Any, frame: Any) -> tuple[int, int] | None:
    """`VideoInfo.stretched` of a frame: the side that is too short grows, so that no pixel is lost."""
    aspect = float(stream.sample_aspect_ratio or 1)
    if not 1 / 16 <= aspect <= 16:  # a damaged header
        return None
    size = round(frame.height * max(1, 1 / aspect)), round(frame.width * max(1, aspect))
    return None if size == (frame.height, frame.width) else size


def _upright(stream: Any, frame: Any) -> np.ndarray:
    """uint8 RGB `[H, W, 3]` of a frame as it is to be shown."""
    height, width = _stretched(stream, frame) or (None, None)
    pixels = frame.to_ndarray(format="rgb24", height=height, width=width)
    transpose, upside_down, mirror = _orientation(frame)
    pixels = pixels.swapaxes(0, 1) if transpose else pixels
    return pixels[:: -1 if upside_down else 1, :: -1 if mirror else 1]


def _picture(path: Path) -> Tensor:
    """uint8 RGB `[3, 1, H, W]` of an image file, turned as it says."""
    try:
        return torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1)[:, None]
    except UnreadableImage as error:
        raise UnreadableVideo(str(error)) from error


def probe(path: Path) -> VideoInfo:
    """Reads the header, the first frame and the end of a video file; an image is a video of one frame.

    Raises:
        UnreadableVideo: it is no video, or its first frame cannot be decoded; the message names the file and the
            reason.
    """
    if path.suffix.lower() in PICTURES:
        height, width = _picture(path).shape[2:]
        return VideoInfo(1.0, 1.0, height, width)
    with _opened(path, "opened as a video") as (container, stream):
        fps = _rate(path, stream)
        frame = next(container.decode(stream), None)
        seconds = _seconds(container, stream, fps)
        if frame is None or seconds <= 0:
            raise UnreadableVideo(f"{path} holds no frames")
        turned, stretched = _orientation(frame), _stretched(stream, frame)
        size = stretched or (frame.height, frame.width)
        height, width = size[::-1] if turned[0] else size
        return VideoInfo(fps, seconds, height, width, turned, stretched)


class _Frames:
    """Frames of a stream in the order in which they are shown, each with its time in seconds after the first one.

    Raises:
        UnreadableVideo: there are none.
    """

    def __init__(self, path: Path, container: Any, stream: Any):
        self.container, self.stream = container, stream
        self.base, self.gap = float(stream.time_base), 1 / _rate(path, stream)
        self.rest = container.decode(stream)
        first = next(self.rest, None)
        if first is None:
            raise UnreadableVideo(f"{path} holds no frames")
        self.first, self.zero = first, _ticks(container, first) or 0

    def since(self, time: float) -> Iterator[tuple[Any, float]]:
        """From the last key frame up to `time` on; from the first frame if that is near, or the file's index lies."""
        if time <= 1:
            yield from self._timed(chain([self.first], self.rest))
            return
        _seek(self.container, self.stream, time / self.base)
        sought = self._timed(self.container.decode(self.stream))
        first = next(sought, None)
        if first is not None and first[1] <= time:
            yield first
            yield from sought
            return
        _seek(self.container, self.stream, 0)
        yield from self._timed(self.container.decode(self.stream))

    def _timed(self, frames: Iterable[Any]) -> Iterator[tuple[Any, float]]:
        now = -self.gap
        for frame in frames:
            ticks = _ticks(self.container, frame)
            now = now + self.gap if ticks is None else (ticks - self.zero) * self.base
            yield frame, now


def read_clip(path: Path, *, times: np.ndarray) -> Tensor:
    """The frames shown at `times` seconds after the first one, turned as the file says, with square pixels.

    Args:
        path: of the file.
        times: rising, `[T]`.

    Returns:
        uint8 RGB `[3, T, H, W]`.

    Raises:
        EndsEarly: the video ends before the last time.
        UnreadableVideo: decoding fails.
    """
    if path.suffix.lower() in PICTURES:
        return _picture(path).expand(-1, len(times), -1, -1)
    with _opened(path, "decoded") as (container, stream):
        frames = _Frames(path, container, stream)
        slack = 0.1 * frames.gap  # clocks are rounded
        shown: list[np.ndarray] = []
        before, end = frames.first, 0.0

        def show(until: float) -> None:
            while len(shown) < len(times) and times[len(shown)] + slack < until:
                shown.append(_upright(stream, before))

        for frame, now in frames.since(times[0] + slack):
            show(now)
            before, end = frame, now + frames.gap
            if len(shown) == len(times):
                break
        show(end + 2 * slack)
        if len(shown) < len(times):
            early = EndsEarly(f"{path} ends before second {times[-1]:.2f}")
            early.seconds = end
            raise early
        return torch.from_numpy(np.stack(shown)).permute(3, 0, 1, 2)
