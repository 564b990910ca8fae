"""Videos encoded once, so that training never sees the autoencoder.

    python -m foveal.zoo.data.latents FOLDER OUT --vae VAE --frames 81 --size 480x832 --fps 16

writes `OUT/*.safetensors` with the latents of every clip, each under a key that is the hash of the file's bytes, the
autoencoder's configuration and weights, and how the clip was cut: what was encoded before, also by a run that was
killed, is not encoded again. `OUT/latents.json`, written at the end, lists the clips with their classes and captions as
the folder has them now. `data=latents data.root=OUT` trains on them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from .buckets import nearest_bucket
from .clips import UnreadableVideo, cover, read_clip
from .latent_videos import DESCRIPTION, load_vae, read_keys
from .videofolder import Video, VideoFolder, read_embedding


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def vae_hash(folder: Path) -> str:
    """sha256 of an autoencoder's configuration and weights, wherever it lies."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"--vae={str(folder)!r} holds no .safetensors: pass the folder of a diffusers autoencoder"
        )
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
    parts = [json.dumps(config, sort_keys=True), *(file_hash(path) for path in files)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def clip_key(file: str, vae: str, transform: dict[str, Any]) -> str:
    """Name of a clip's latents: what they depend on, hashed."""
    parts = json.dumps([file, vae, transform], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


class ShardWriter:
    """Collects tensors of `size` clips and writes them; a shard appears whole, under its last name, or not at all."""

    def __init__(self, root: Path, *, size: int):
        self.root, self.size, self.clips = root, size, 0
        self.tensors: dict[str, Tensor] = {}
        self.known = set(read_keys(root))

    def add(self, key: str, tensors: dict[str, Tensor]) -> None:
        self.tensors |= {f"{key}.{name}": value.contiguous() for name, value in tensors.items()}
        self.known |= {f"{key}.{name}" for name in tensors}

    def clip_done(self) -> None:
        self.clips += 1
        if self.clips >= self.size:
            self.flush()

    def flush(self) -> None:
        if self.tensors:
            name = hashlib.sha256("".join(sorted(self.tensors)).encode()).hexdigest()[:16]
            partial = self.root / f"{name}.{os.getpid()}.partial"  # another process may be at the same clips
            save_file(self.tensors, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(self.root / f"{name}.safetensors")
        self.tensors, self.clips = {}, 0


def clip_starts(video: Video, *, frames: int, gap: float, clips: int) -> list[float]:
    """Seconds at which `clips` evenly spaced clips of a video start; fewer if it is too short for that many."""
    assert video.info is not None
    room = max(0.0, video.info.seconds - 1 / video.info.fps - (frames - 1) * gap)
    most = min(clips, 1 + int(room / gap))
    return [room / 2] if most == 1 else [room * i / (most - 1) for i in range(most)]


def encode_folder(
    data: VideoFolder, root: Path, *, vae: Any, vae_folder: Path, clips: int = 1, shard: int = 64
) -> Iterator[str | None]:
    """Encodes the clips of a folder that a cache does not hold yet, and lists all of the folder's.

    Args:
        data: the folder; its `options` say how clips are cut.
        root: of the cache.
        vae: an autoencoder of `zoo.video.vae`.
        vae_folder: where it was loaded from.
        clips: of each video, evenly spaced.
        shard: clips of a file.

    Yields:
        For every video None, or why it was left out.
    """
    from ..video.vae import encode

    root.mkdir(parents=True, exist_ok=True)
    identity, options, listed = vae_hash(vae_folder), data.options, []
    writer = ShardWriter(root, size=shard)
    for video in data.readable():
        assert video.info is not None
        height, width = options["sizes"][nearest_bucket(video.info.height, video.info.width, options["sizes"])]
        gap = options["stride"] / (options["fps"] or video.info.fps)
        item: dict[str, Any] = {"split": video.split, "label": video.label, "caption": video.caption, "text": None}
        if video.embedding is not None:
            item["text"] = clip_key(file_hash(video.embedding), "text", {"length": options["text_length"]})
            if f"{item['text']}.text" not in writer.known:
                writer.add(item["text"], read_embedding(video.embedding, length=options["text_length"]))
        file, failed, cut = file_hash(video.path), None, []
        for start in clip_starts(video, frames=data.frames, gap=gap, clips=clips):
            times = [round(start + i * gap, 6) for i in range(data.frames)]
            key = clip_key(file, identity, {"times": times, "height": height, "width": width})
            if f"{key}.latents" not in writer.known:
                try:
                    pixels = cover(read_clip(video.path, times=np.array(times)), height=height, width=width)
                except UnreadableVideo as error:
                    failed = str(error)
                    break
                writer.add(key, {"latents": encode(vae, pixels[None].to(vae.device))[0].to(torch.bfloat16).cpu()})
                writer.clip_done()
            cut.append({"key": key, **item})
        listed += cut if failed is None else []
        yield failed
    writer.flush()
    description = {
        "vae": str(vae_folder.resolve()),
        "vae_sha256": identity,
        "classes": data.class_names,
        "text_dim": data.text_dim,
        "sample_size": [data.frames, *options["sizes"][0]],
        "clips": listed,
    }
    partial = root / f"{DESCRIPTION}.{os.getpid()}.partial"
    partial.write_text(json.dumps(description, indent=1) + "\n")
    partial.replace(root / DESCRIPTION)


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
    model = load_vae(vae).to(device)
    work = encode_folder(data, out, vae=model, vae_folder=vae, clips=clips, shard=shard)
    failed = [reason for reason in track(work, description="encoding", total=len(data.listed)) if reason]
    failed = data.skipped + failed
    count = len(json.loads((out / DESCRIPTION).read_text())["clips"])
    typer.echo(f"{count} clips in {out}; {len(failed)} videos left out")
    for reason in failed:
        typer.echo(f"  {reason}")


if __name__ == "__main__":
    typer.run(main)
