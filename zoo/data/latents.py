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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from .clip_dataset import clip_room, fit_clip, frame_gap, measured
from .clips import EndsEarly, UnreadableVideo, VideoInfo, cover, read_clip
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


def clip_times(info: VideoInfo, options: dict[str, Any], *, clips: int) -> list[list[float]]:
    """Seconds of the frames of `clips` evenly spaced clips of a video; fewer if it is too short for that many."""
    room, gap = max(0.0, clip_room(options, info)), frame_gap(options, info)
    most = min(clips, 1 + int(room / gap))
    starts = [room / 2] if most == 1 else [room * i / (most - 1) for i in range(most)]
    return [[round(start + i * gap, 6) for i in range(options["frames"])] for start in starts]


def check_sizes(vae: Any, options: dict[str, Any]) -> None:
    """Refuse clips that an autoencoder cannot take.

    Raises:
        ValueError: names the option, its value and what it must be a multiple of.
    """
    from ..video.vae import latent_space

    space = latent_space(vae)
    wrong = [count for count in options["frames"] if (count - 1) % space.time]
    if wrong:
        raise ValueError(f"--frames={wrong[0]} must be {space.time} * n + 1 for a {type(vae).__name__}")
    for height, width in options["sizes"]:
        if height % space.space or width % space.space:
            raise ValueError(f"--size={height}x{width} must be multiples of {space.space} for a {type(vae).__name__}")


@dataclass(frozen=True)
class Encoder:
    """Clips of videos to latents of a cache, those that it does not hold yet.

    Args:
        vae: an autoencoder of `zoo.video.vae`.
        identity: its hash.
        writer: of the cache.
        options: of the `VideoFolder`; they say how clips are cut.
        clips: of each video, evenly spaced.
    """

    vae: Any
    identity: str
    writer: ShardWriter
    options: dict[str, Any]
    clips: int

    def keys(self, video: Video) -> list[str]:
        """Of a video's clips, all of which are in the cache then.

        Raises:
            UnreadableVideo: one of them cannot be decoded.
        """
        assert video.info is not None
        try:
            return self._encode(video, video.info)
        except EndsEarly as early:
            return self._encode(video, measured(video, early, fit_clip(self.options, video.info)))

    def _encode(self, video: Video, info: VideoInfo) -> list[str]:
        from ..video.vae import encode

        clip = fit_clip(self.options, info)
        height, width = clip["size"]
        cut: dict[str, Any] = {"height": height, "width": width}
        if any(info.turned):
            cut["turned"] = info.turned
        if info.stretched is not None:
            cut["stretched"] = info.stretched
        file, keys = file_hash(video.path), []
        for times in clip_times(info, clip, clips=self.clips):
            key = clip_key(file, self.identity, {"times": times, **cut})
            if f"{key}.latents" not in self.writer.known:
                pixels = cover(read_clip(video.path, times=np.array(times)), height=height, width=width)
                latents = encode(self.vae, pixels[None].to(self.vae.device))[0]
                self.writer.add(key, {"latents": latents.to(torch.bfloat16).cpu()})
                self.writer.clip_done()
            keys.append(key)
        return keys

    def text_key(self, video: Video) -> str | None:
        """Of a video's embedding, which is in the cache then; None without."""
        if video.embedding is None:
            return None
        length = self.options["text_length"]
        key = clip_key(file_hash(video.embedding), "text", {"length": length})
        if f"{key}.text" not in self.writer.known:
            self.writer.add(key, read_embedding(video.embedding, length=length))
        return key


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

    Raises:
        ValueError: clips of sizes that the autoencoder cannot take, or a damaged file of the cache.
    """
    check_sizes(vae, data.options)
    root.mkdir(parents=True, exist_ok=True)
    identity, listed = vae_hash(vae_folder), []
    writer = ShardWriter(root, size=shard)
    encoder = Encoder(vae, identity, writer, data.options, clips)
    for video in data.readable():
        try:
            text, keys = encoder.text_key(video), encoder.keys(video)
        except UnreadableVideo as error:
            yield str(error)
            continue
        item = {"split": video.split, "label": video.label, "caption": video.caption, "text": text}
        listed += [{"key": key, **item} for key in keys] * (video.repeats if video.split == "train" else 1)
        yield None
    writer.flush()
    description = {
        "vae": str(vae_folder.resolve()),
        "vae_sha256": identity,
        "classes": data.class_names,
        "text_dim": data.text_dim,
        "sample_size": [data.frames, *data.options["sizes"][0]],
        "clips": listed,
    }
    partial = root / f"{DESCRIPTION}.{os.getpid()}.partial"
    partial.write_text(json.dumps(description, indent=1) + "\n")
    partial.replace(root / DESCRIPTION)


def main(
    folder: Annotated[Path, typer.Argument(help="videos: CLASS/*.mp4, or metadata.csv with captions")],
    out: Annotated[Path, typer.Argument(help="the cache; what it holds already is kept")],
    vae: Annotated[
        Path, typer.Option(help="folder of an autoencoder of Wan, LTX, HunyuanVideo, CogVideoX or an AutoencoderTiny")
    ],
    frames: Annotated[list[int] | None, typer.Option(help="of a clip [17]; several: the most that fit a video")] = None,
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

    try:
        data = VideoFolder(
            root=str(folder),
            captions=None if captions is None else str(captions),
            frames=frames or [17],
            sizes=[_size(one) for one in size or ["256x256"]],
            fps=fps,
            stride=stride,
            held_out=held_out,
            text_length=text_length,
            num_workers=0,
        )
        model = load_vae(vae).to(device)
        check_sizes(model, data.options)
        read_keys(out)
    except (ValueError, FileNotFoundError) as error:
        typer.echo(f"foveal.zoo.data.latents: {error}", err=True)
        raise typer.Exit(2) from error
    work = encode_folder(data, out, vae=model, vae_folder=vae, clips=clips, shard=shard)
    failed = [reason for reason in track(work, description="encoding", total=len(data.listed)) if reason]
    failed = data.skipped + failed
    count = len(json.loads((out / DESCRIPTION).read_text())["clips"])
    typer.echo(f"{count} clips in {out}; {len(failed)} videos left out")
    for reason in failed:
        typer.echo(f"  {reason}")


def _size(text: str) -> list[int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise ValueError(f"--size={text} must be HEIGHTxWIDTH, such as 480x832")
    return [int(height), int(width)]


if __name__ == "__main__":
    typer.run(main)
