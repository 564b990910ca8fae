"""Small video files whose frames say which they are, and folders of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from foveal.zoo.data import VideoFolder

av = pytest.importorskip("av")


def write_video(
    path: Path, *, frames: int = 12, fps: int = 10, height: int = 32, width: int = 48, blue: int = 0
) -> Path:
    """Frame `i` has red 20 i: what was decoded says which frame it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10", "g": "5"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            pixels = np.zeros((height, width, 3), dtype=np.uint8)
            pixels[..., 0], pixels[..., 2] = 20 * i, blue
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def shown(clip: torch.Tensor) -> list[int]:
    """Which frames a clip `[3, T, H, W]` of such a video in 0..1 has."""
    return (clip[0].mean(dim=(1, 2)) * 255 / 20).round().int().tolist()


def damage(path: Path, *, first: int = 5) -> None:
    """Destroys the pictures from the packet `first` on; what tells of them stays."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = sorted((packet.pos, packet.size) for packet in container.demux() if packet.size)
    for start, size in packets[first:]:
        data[start : start + size] = bytes(size)
    path.write_bytes(data)


def folder(root: Path, **files: dict) -> Path:
    for name, options in files.items():
        write_video(root / f"{name.replace('__', '/')}.mp4", **options)
    return root


def open_folder(root: Path, **options) -> VideoFolder:
    data = VideoFolder(
        root=str(root), **({"batch_size": 2, "frames": 4, "sizes": [[16, 24]], "num_workers": 0} | options)
    )
    data.setup()
    return data
