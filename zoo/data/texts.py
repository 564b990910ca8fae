"""Captions embedded once, so that training never sees the text encoder.

    python -m foveal.zoo.data.texts FOLDER OUT.csv --encoder ENCODER

reads the captions of a folder of videos (a table, or .txt files beside the videos) and writes a table with a column
`embedding`, for `data.captions=OUT.csv`, and one safetensors file per caption beside it. Files are named by the hash of
caption, encoder and length: a run that was killed goes on where it stopped, and equal captions are embedded once.
`OUT.empty.safetensors` holds the empty prompt, for `task.null_text`.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from .clips import PICTURES
from .foreign import reason
from .latents import file_hash
from .videofiles import TABLES, Video, list_videos

Encode = Callable[[Sequence[str]], list[Tensor]]  # captions → [L, D] each


def find_encoder(folder: Path) -> tuple[Path, Path]:
    """Folders of the text encoder and of its tokenizer, which may be those of a pipeline of diffusers.

    Raises:
        FileNotFoundError: there is no encoder.
    """
    if (folder / "text_encoder" / "config.json").is_file():
        return folder / "text_encoder", folder / "tokenizer"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"--encoder={str(folder)!r} is neither the folder of a text encoder of transformers (config.json) nor of a "
            "pipeline of diffusers with one (text_encoder/config.json)"
        )
    tokens = folder.parent / "tokenizer"
    return folder, tokens if folder.name == "text_encoder" and tokens.is_dir() else folder


def load_encoder(folder: Path, *, length: int, device: str, padded: bool = False) -> tuple[Encode, str]:
    """A function that embeds captions, and the hash of what its results depend on.

    Args:
        folder: see `find_encoder`.
        length: tokens that a caption is cut to.
        device: of the encoder.
        padded: pad captions to `length` tokens, which are all encoded and kept, as CogVideoX does; else padding is
            hidden and left out.

    Raises:
        FileNotFoundError: see `find_encoder`.
        ValueError: transformers cannot load it.
        ImportError: transformers is not installed.
    """
    try:
        from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer
    except ImportError as error:
        raise ImportError("text encoders are those of transformers: pip install transformers") from error
    weights, tokens = find_encoder(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokens, local_files_only=True)
        try:
            model = AutoModelForTextEncoding.from_pretrained(weights, local_files_only=True)
        except ValueError:  # of a kind that has no head or decoder to leave out
            model = AutoModel.from_pretrained(weights, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"--encoder={str(folder)!r} cannot be loaded: {reason(error)}") from error
    model = model.to(device).eval()

    @torch.no_grad()
    def encode(captions: Sequence[str]) -> list[Tensor]:
        padding = "max_length" if padded else True
        given = tokenizer(list(captions), padding=padding, truncation=True, max_length=length, return_tensors="pt")
        mask = given.attention_mask.to(device)
        if padded:
            mask = torch.ones_like(mask)
        if not mask.shape[1]:  # of empty captions and a tokenizer that adds nothing
            return [torch.empty(0, 0) for _ in captions]
        out = model(input_ids=given.input_ids.to(device), attention_mask=mask)[0]  # [B, L, D]
        return [text[seen.bool()] for text, seen in zip(out, mask, strict=True)]

    files = [*sorted(weights.glob("*.safetensors")), *sorted(weights.glob("*.bin")), weights / "config.json"]
    parts = [*(file_hash(file) for file in files), str(length), *(["padded"] if padded else [])]
    return encode, hashlib.sha256("".join(parts).encode()).hexdigest()


def embed(captions: Sequence[str], folder: Path, encode: Encode, identity: str, *, batch: int) -> Iterator[int]:
    """Writes the embeddings of captions that a folder does not hold yet; yields how many have been done."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [text for text in dict.fromkeys(captions) if not (folder / embedding_name(text, identity)).is_file()]
    for start in range(0, len(missing), batch):
        some = missing[start : start + batch]
        for text, value in zip(some, encode(some), strict=True):
            write_embedding(folder / embedding_name(text, identity), value)
        yield len(some)


def write_embedding(path: Path, text: Tensor) -> None:
    """Writes a safetensors file with `text` `[L, D]` in bfloat16; it appears whole or not at all."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file({"text": text.to(torch.bfloat16).cpu().contiguous()}, partial)
    partial.replace(path)


def embedding_name(caption: str, identity: str) -> str:
    """Name of the file of a caption's embedding."""
    return hashlib.sha256(f"{identity} {caption}".encode()).hexdigest()[:32] + ".safetensors"


def write_table(path: Path, videos: Sequence[Video], root: Path, folder: Path, identity: str) -> None:
    """Writes the table of `VideoFolder` with the captions' embeddings."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption", "split", "embedding", "repeats"])
        for video in videos:
            name = Path(os.path.relpath(video.path, root)).as_posix()
            embedding = (folder / embedding_name(video.caption, identity)).resolve()
            table.writerow([name, video.caption, video.split, embedding, video.repeats])
    partial.replace(path)


def read_captions(root: Path, captions: Path | None, held_out: float) -> list[Video]:
    """The videos and captioned images of a folder with their captions.

    Raises:
        FileNotFoundError: no such folder or table.
        ValueError: there are no videos, or a video has no caption.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"FOLDER={str(root)!r} is not a folder")
    if captions is not None and not captions.is_file():
        raise FileNotFoundError(f"--captions={str(captions)!r} does not exist")
    table = captions or next((root / name for name in TABLES if (root / name).exists()), None)
    videos, _ = list_videos(root, captions=table, held_out=held_out, pictures=True)
    if table is None:  # covers and thumbnails lie beside videos, too
        videos = [video for video in videos if video.caption or video.path.suffix.lower() not in PICTURES]
    without = [video.path.name for video in videos if not video.caption]
    if without:
        raise ValueError(
            f"{len(without)} of {len(videos)} videos of {str(root)!r} have no caption, the first is {without[0]}: a "
            "table with file_name and caption, or a .txt file beside each video, says it"
        )
    return videos


def main(
    folder: Annotated[Path, typer.Argument(help="videos with captions: metadata.csv, or .txt files beside them")],
    out: Annotated[Path, typer.Argument(help="the table to write; its embeddings go to a folder beside it")],
    encoder: Annotated[Path, typer.Option(help="folder of a text encoder of transformers, or of a pipeline with one")],
    captions: Annotated[Path | None, typer.Option(help=".csv or .jsonl with file_name and caption")] = None,
    length: Annotated[int, typer.Option(help="tokens that a caption is cut to")] = 226,
    held_out: Annotated[float, typer.Option(help="share to validate on where nothing else says it")] = 0.05,
    batch: Annotated[int, typer.Option(help="captions at a time")] = 16,
    padded: Annotated[bool, typer.Option("--padded", help="encode and keep padding up to --length: CogVideoX")] = False,
    device: Annotated[str, typer.Option(help="of the encoder")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Embeds the captions of a folder of videos; run it again to go on where it was stopped."""
    from rich.progress import Progress

    try:
        if out.suffix != ".csv":
            raise ValueError(f"OUT={str(out)!r} must be a .csv file")
        if captions is not None and captions.resolve() == out.resolve():
            raise ValueError(f"OUT={str(out)!r} is the table of the captions: it would be overwritten")
        if length < 1 or batch < 1:
            raise ValueError(f"--length={length} and --batch={batch} must be at least 1")
        videos = read_captions(folder, captions, held_out)
        encode, identity = load_encoder(encoder, length=length, device=device, padded=padded)
    except (ValueError, FileNotFoundError, ImportError) as error:
        typer.echo(f"foveal.zoo.data.texts: {error}", err=True)
        raise typer.Exit(2) from error
    texts, beside = [video.caption for video in videos], out.with_suffix(".embeddings")
    with Progress() as progress:
        task: Any = progress.add_task("embedding", total=len(set(texts)))
        for done in embed(texts, beside, encode, identity, batch=batch):
            progress.advance(task, done)
    (nothing,) = encode([""])
    if len(nothing):
        write_embedding(out.with_suffix(".empty.safetensors"), nothing)
    write_table(out, videos, folder, beside, identity)
    typer.echo(f"{len(videos)} captions in {out}, {len(set(texts))} embeddings in {beside}: data.captions={out}")


if __name__ == "__main__":
    typer.run(main)
