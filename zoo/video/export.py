"""Writing clips to files: GIF with Pillow, MP4 with PyAV."""

from __future__ import annotations

import tempfile
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from diffusers.utils import export_to_gif
from PIL import Image

SUFFIXES = ("gif", "mp4")


def save_gif(frames: list[Image.Image], path: str | Path, *, fps: float = 8) -> Path:
    """Frames of equal size to a GIF that loops; its delays are hundredths of a second, so at most 50 fps."""
    return Path(export_to_gif(frames, str(path), fps=fps))


def save_mp4(frames: list[Image.Image], path: str | Path, *, fps: float = 8) -> Path:
    """Frames of equal size to H.264 in MP4, as browsers show it.

    An odd last row or column is repeated, since the format stores colours at half resolution.
    """
    import av

    pixels = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])  # [T, H, W, 3]
    height, width = pixels.shape[1:3]
    rate = Fraction(fps).limit_denominator(1001)  # 29.97 and 23.976 among them
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "17"})
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return Path(path)


def check_path(path: str | Path | None, kind: str) -> None:
    """Refuse a path to which files of a kind cannot be written.

    Raises:
        ValueError: a kind other than "gif" and "mp4", or a path with another suffix.
        ImportError: films need PyAV and it is not installed.
    """
    if kind not in SUFFIXES:
        raise ValueError(f"kind={kind!r} must be one of {SUFFIXES}")
    if path is not None and Path(path).suffix not in ("", f".{kind}"):
        raise ValueError(f"output_path={str(path)!r} must end in .{kind}")
    if kind == "mp4" and find_spec("av") is None:
        raise ImportError("MP4 files need PyAV: pip install 'foveal[video]'; output_type='gif' works without")


def save_clips(clips: list[list[Image.Image]], path: str | Path | None, *, kind: str, fps: float = 8) -> list[Path]:
    """One file per clip.

    Args:
        clips: frames of each.
        path: file of a single clip; of more, `clip.gif` becomes `clip_0.gif`, `clip_1.gif`, ….  None: new files in the
            folder for temporary files.
        kind: "gif" or "mp4"; becomes the suffix where path has none.
        fps: frames a second.

    Returns:
        The paths, in order.

    Raises:
        ValueError, ImportError: see `check_path`.
    """
    check_path(path, kind)
    path = Path(tempfile.mkdtemp(prefix="foveal-")) / f"clip.{kind}" if path is None else Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save = save_gif if kind == "gif" else save_mp4
    names = [path.stem] if len(clips) == 1 else [f"{path.stem}_{i}" for i in range(len(clips))]
    return [save(frames, path.with_name(f"{name}.{kind}"), fps=fps) for name, frames in zip(names, clips, strict=True)]
