"""Videos encoded once, so that training never sees the autoencoder.

    python -m foveal.zoo.data.latents FOLDER OUT --vae VAE --frames 81 --size 480x832 --fps 16

writes `OUT/*.safetensors` with the latents of every clip, each under a key that is the hash of the file's bytes, the
autoencoder's configuration and weights, and how the clip was cut: what was encoded before, also by a run that was
killed, is not encoded again. `data=latents data.root=OUT` trains on them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from .buckets import nearest_bucket
from .clips import UnreadableVideo, cover, read_clip
from .latent_videos import DESCRIPTION, load_vae, read_entries
from .videofolder import Video, VideoFolder, read_embedding


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def vae_hash(folder: Path) -> str:
    """sha256 of an autoencoder's configuration and weights."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    if not any(path.suffix == ".safetensors" for path in files):
        raise FileNotFoundError(
            f"--vae={str(folder)!r} holds no .safetensors: pass the folder of a diffusers autoencoder"
        )
    return hashlib.sha256("".join(path.name + file_hash(path) for path in files).encode()).hexdigest()


def clip_key(file: str, vae: str, transform: dict[str, Any]) -> str:
    """Name of a clip's latents: what they depend on, hashed."""
    parts = json.dumps([file, vae, transform], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


class ShardWriter:
    """Collects clips and writes `size` of them at a time; a shard appears whole, under its last name, or not at all."""

    def __init__(self, root: Path, *, size: int):
        self.root, self.size = root, size
        self.tensors: dict[str, Tensor] = {}
        self.entries: dict[str, dict[str, Any]] = {}

    def add(self, key: str, entry: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.entries[key] = entry
        self.tensors |= {f"{key}.{name}": value.contiguous() for name, value in tensors.items()}
        if len(self.entries) >= self.size:
            self.flush()

    def flush(self) -> None:
        if not self.entries:
            return
        name = hashlib.sha256("".join(sorted(self.entries)).encode()).hexdigest()[:16]
        partial = self.root / f"{name}.partial"
        save_file(self.tensors, partial, metadata={"entries": json.dumps(self.entries)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(self.root / f"{name}.safetensors")
        self.tensors, self.entries = {}, {}


def clip_starts(video: Video, *, frames: int, gap: float, clips: int) -> list[float]:
    """Seconds at which `clips` evenly spaced clips of a video start; fewer if it is too short for that many."""
    assert video.info is not None
    room = max(0.0, video.info.seconds - 1 / video.info.fps - (frames - 1) * gap)
    most = min(clips, 1 + int(room / gap))
    return [room / 2] if most == 1 else [room * i / (most - 1) for i in range(most)]


def encode_folder(
    data: VideoFolder, root: Path, *, vae: Any, vae_id: str, clips: int = 1, shard: int = 64
) -> Iterator[str | None]:
    """Encodes the clips of a folder that a cache does not hold yet.

    Args:
        data: the folder; its `options` say how clips are cut.
        root: of the cache.
        vae: an autoencoder of `zoo.video.vae`.
        vae_id: hash of its configuration and weights.
        clips: of each video, evenly spaced.
        shard: clips of a file.

    Yields:
        For every video None, or why it was left out.
    """
    from ..video.vae import encode

    root.mkdir(parents=True, exist_ok=True)
    done, writer, options = read_entries(root), ShardWriter(root, size=shard), data.options
    for video in data.readable():
        assert video.info is not None
        height, width = options["sizes"][nearest_bucket(video.info.height, video.info.width, options["sizes"])]
        gap = options["stride"] / (options["fps"] or video.info.fps)
        file, failed = file_hash(video.path), None
        for start in clip_starts(video, frames=data.frames, gap=gap, clips=clips):
            times = [round(start + i * gap, 6) for i in range(data.frames)]
            key = clip_key(file, vae_id, {"times": times, "height": height, "width": width})
            if key in done:
                continue
            try:
                pixels = cover(read_clip(video.path, times=torch.tensor(times).numpy()), height=height, width=width)
            except UnreadableVideo as error:
                failed = str(error)
                break
            latents = encode(vae, pixels[None])[0].to(torch.bfloat16).cpu()
            text = {} if video.embedding is None else read_embedding(video.embedding, length=options["text_length"])
            entry = {"split": video.split, "label": video.label, "caption": video.caption, "shape": list(latents.shape)}
            writer.add(key, entry, {"latents": latents, **text})
        yield failed
    writer.flush()


def main(
    folder: Annotated[Path, typer.Argument(help="videos: CLASS/*.mp4, or metadata.csv with captions")],
    out: Annotated[Path, typer.Argument(help="the cache; what it holds already is kept")],
    vae: Annotated[Path, typer.Option(help="folder of AutoencoderKLWan, AutoencoderKLLTXVideo or AutoencoderTiny")],
    frames: Annotated[int, typer.Option(help="of a clip")] = 17,
    size: Annotated[list[str] | None, typer.Option(help="HEIGHTxWIDTH; several make buckets")] = None,
    fps: Annotated[float | None, typer.Option(help="rate to take frames at; by default the video's own")] = None,
    stride: Annotated[int, typer.Option(help="every how many frames")] = 1,
    clips: Annotated[int, typer.Option(help="of each video")] = 1,
    captions: Annotated[Path | None, typer.Option(help=".csv or .jsonl with file_name and caption")] = None,
    text_length: Annotated[int, typer.Option(help="words that text embeddings are cut or padded to")] = 64,
    held_out: Annotated[float, typer.Option(help="share to validate on where nothing else says it")] = 0.05,
    shard: Annotated[int, typer.Option(help="clips of a file")] = 64,
    device: Annotated[str, typer.Option(help="of the autoencoder")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Encodes a folder of videos; run it again to go on where it was stopped."""
    from rich.progress import track

    sizes: Sequence[Sequence[int]] = [[int(n) for n in one.lower().split("x")] for one in size or ["256x256"]]
    data = VideoFolder(
        root=str(folder),
        captions=None if captions is None else str(captions),
        frames=frames,
        sizes=sizes,
        fps=fps,
        stride=stride,
        held_out=held_out,
        text_length=text_length,
        num_workers=0,
    )
    model, identity = load_vae(vae).to(device), vae_hash(vae)
    description = {
        "vae": str(vae.resolve()),
        "vae_sha256": identity,
        "classes": data.class_names,
        "text_dim": data.text_dim,
        "sample_size": [frames, *sizes[0]],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    work = encode_folder(data, out, vae=model, vae_id=identity, clips=clips, shard=shard)
    failed = [reason for reason in track(work, description="encoding", total=len(data.listed)) if reason]
    failed = data.skipped + failed
    typer.echo(f"{len(read_entries(out))} clips in {out}; {len(failed)} videos left out")
    for reason in failed:
        typer.echo(f"  {reason}")


if __name__ == "__main__":
    typer.run(main)
