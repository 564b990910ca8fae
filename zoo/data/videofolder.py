"""Your own videos: a folder a class, or a table with captions."""

from __future__ import annotations

import csv
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .buckets import BucketSampler, nearest_bucket
from .clips import SUFFIXES, UnreadableVideo, VideoInfo, cover, probe, read_clip
from .video import Item, VideoData

SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "eval"), "test": ("test", "testing")}
TABLES = ("metadata.csv", "metadata.jsonl")
TRIES = 20  # files in a row that may fail to decode before training stops


@dataclass(frozen=True)
class Video:
    """A file of the folder and what is known of it."""

    path: Path
    split: str
    label: int = 0
    caption: str = ""
    embedding: Path | None = None
    info: VideoInfo | None = None


def _share(name: str) -> float:
    """0 to 1 by the name alone, so that a file stays in its split when others come or go."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _split_of(relative: Path, held_out: float) -> str:
    for split, names in SPLITS.items():
        if len(relative.parts) > 1 and relative.parts[0] in names:
            return split
    return "val" if _share(relative.as_posix()) < held_out else "train"


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a .csv or .jsonl file.

    Raises:
        ValueError: another kind of file, a row that is no JSON object, or no column `file_name`.
    """
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            rows: list[Any] = list(csv.DictReader(file))
    elif path.suffix == ".jsonl":
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(f"data.captions={str(path)!r} is no JSON lines file: {error}") from error
    else:
        raise ValueError(f"data.captions={str(path)!r} must be a .csv or .jsonl file")
    if not rows or not all(isinstance(row, dict) and row.get("file_name") for row in rows):
        raise ValueError(f"data.captions={str(path)!r} must have rows with file_name, and caption for text")
    return rows


def list_videos(root: Path, *, captions: Path | None, held_out: float) -> tuple[list[Video], list[str]]:
    """The files of a folder, and the names of its classes (none with a table)."""
    if captions is not None:
        videos = []
        for row in read_table(captions):
            split = row.get("split") or _split_of(Path(row["file_name"]), held_out)
            if split not in SPLITS:
                raise ValueError(
                    f"split={split!r} of {row['file_name']} in {captions} must be one of {', '.join(SPLITS)}"
                )
            embedding = root / row["embedding"] if row.get("embedding") else None
            videos.append(Video(root / row["file_name"], split, caption=row.get("caption") or "", embedding=embedding))
        return videos, []
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"data.root={str(root)!r} holds no videos ({', '.join(SUFFIXES)})")
    names = {path: path.parent.name if path.parent != root else "" for path in found}
    splits = {path: _split_of(path.relative_to(root), held_out) for path in found}
    split_folders = {name for folders in SPLITS.values() for name in folders}
    classes = sorted({name for name in names.values() if name and name not in split_folders})
    number = {name: i for i, name in enumerate(classes)}
    return [Video(path, splits[path], label=number.get(names[path], 0)) for path in found], classes


class ClipDataset(Dataset):
    """A clip of each video: at a random time and place in training, in the middle otherwise.

    Videos that turn out to be undecodable are replaced by the next one, and named in the item's `broken`.
    """

    def __init__(self, videos: list[Video], buckets: list[int], *, options: dict[str, Any], training: bool):
        self.videos, self.buckets, self.options, self.training = videos, buckets, options, training
        self.peers: dict[int, list[int]] = {bucket: [] for bucket in set(buckets)}
        self.places: list[int] = []  # of every video among its peers
        for index, bucket in enumerate(buckets):
            self.places.append(len(self.peers[bucket]))
            self.peers[bucket].append(index)

    def __len__(self) -> int:
        return len(self.videos)

    def shape(self, index: int) -> tuple[int, ...]:
        """Of a clip, `(3, T, H, W)`."""
        return 3, self.options["frames"], *self.options["sizes"][self.buckets[index]]

    def times(self, info: VideoInfo) -> np.ndarray:
        """Seconds of the frames, `[T]`."""
        gap = self.options["stride"] / (self.options["fps"] or info.fps)
        length = (self.options["frames"] - 1) * gap
        room = max(0.0, info.seconds - 1 / info.fps - length)
        start = room * (float(torch.rand(())) if self.training else 0.5)
        return start + gap * np.arange(self.options["frames"])

    def _read(self, index: int) -> Item:
        video, size = self.videos[index], self.options["sizes"][self.buckets[index]]
        assert video.info is not None
        frames = read_clip(video.path, times=self.times(video.info))
        at = torch.rand(2).tolist() if self.training else (0.5, 0.5)
        clip = 2 * cover(frames, height=size[0], width=size[1], at=tuple(at)) - 1
        if self.training and self.options["flip"] and torch.rand(()) < 0.5:
            clip = clip.flip(-1)
        item: Item = {"video": clip, "label": video.label, "caption": video.caption}
        if video.embedding is not None:
            item |= read_embedding(video.embedding, length=self.options["text_length"])
        return item

    def __getitem__(self, index: int) -> Item:
        broken: list[str] = []
        peers, place = self.peers[self.buckets[index]], self.places[index]
        for attempt in range(min(TRIES, len(peers))):
            try:
                item = self._read(peers[(place + attempt) % len(peers)])
            except UnreadableVideo as error:
                broken.append(str(error))
                continue
            return {**item, "broken": "\n".join(broken)}
        raise UnreadableVideo(f"{len(broken)} videos in a row cannot be decoded, the first: {broken[0]}")


def read_embedding(path: Path, *, length: int) -> dict[str, Tensor]:
    """`text` `[length, D]` and `text_mask` `[length]` from a safetensors file with `text` `[L, D]`, cut or padded."""
    from safetensors.torch import load_file

    text = load_file(path)["text"][:length].float()
    mask = torch.arange(length) < len(text)
    return {"text": torch.cat([text, text.new_zeros(length - len(text), text.shape[1])]), "text_mask": mask}


def embedding_width(videos: Sequence[Video]) -> int | None:
    """Channels of the embeddings, read from the files' headers; None where no video has one.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: only some videos have an embedding, or of another width than the first; the message names the row.
    """
    from safetensors import safe_open

    widths: dict[Path, int] = {}
    for video in videos:
        if (video.embedding is None) != (videos[0].embedding is None):
            row, other = (video, videos[0]) if video.embedding is None else (videos[0], video)
            raise ValueError(f"the row of {row.path.name} has no embedding, and that of {other.path.name} has one")
        path = video.embedding
        if path is None or path in widths:
            continue
        if not path.is_file():
            raise FileNotFoundError(f"embedding={str(path)!r} in the row of {video.path.name} does not exist")
        with safe_open(path, framework="pt") as file:
            shape = file.get_slice("text").get_shape() if "text" in file.keys() else []  # noqa: SIM118
        if len(shape) != 2 or shape[1] != next(iter(widths.values()), shape[1]):
            wanted = f"[L, {next(iter(widths.values()))}]" if widths else "[L, D]"
            raise ValueError(f"embedding={str(path)!r} of {video.path.name} has text of {shape}, expected {wanted}")
        widths[path] = shape[1]
    return next(iter(widths.values()), None)


class VideoFolder(VideoData):
    """Clips `[B, 3, frames, H, W]` in -1..1 of the videos of a folder.

    With classes: `root/train/CLASS/*.mp4` and `root/val/CLASS/*.mp4` (`test` if there is one), or `root/CLASS/*.avi`,
    of which `held_out` are validated on. With captions: a table with `file_name` (from `root`), `caption` and, if
    wanted, `split` and `embedding`, a safetensors file with the caption's `text` `[L, D]`.

    Frames are taken as they are stored: a rotation that a file only notes beside them is not applied.

    Files that cannot be opened, or are too short, are left out; how many and which is said once, and again at the end
    for those that turned out to be undecodable in training.

    Args:
        root: the folder.
        captions: the table; None: `root/metadata.csv` or `.jsonl` if there is one.
        frames: of a clip.
        sizes: `(height, width)` of the clips, one or several; a video goes to the size whose aspect ratio is nearest,
            and every batch has one size.
        fps: to take frames at, whatever the video's own; None: its own.
        stride: every how many of those frames.
        held_out: share of the videos to validate on where no folder or table says it.
        flip: mirror half of the training clips.
        text_length: words that `text` is cut or padded to.
        batch_size, seed, shuffle, num_workers: see `SeededData`.

    Raises:
        FileNotFoundError: the folder or the table is not there.
        ValueError: no videos, or none that can be read; rows of the table of which only some have an embedding, or of
            several widths.
    """

    def __init__(
        self,
        *,
        root: str | None,
        captions: str | None = None,
        batch_size: int = 8,
        frames: int = 16,
        sizes: Sequence[Sequence[int]] = ((64, 64),),
        fps: float | None = None,
        stride: int = 1,
        held_out: float = 0.05,
        flip: bool = False,
        text_length: int = 64,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 8,
    ):
        if root is None:
            raise ValueError("data.root is not set: pass data.root=FOLDER, which holds CLASS/*.mp4 or metadata.csv")
        if not Path(root).is_dir():
            raise FileNotFoundError(f"data.root={root!r} is not a folder")
        table = (
            Path(captions) if captions else next((Path(root) / n for n in TABLES if (Path(root) / n).exists()), None)
        )
        if table is not None and not table.is_file():
            raise FileNotFoundError(f"data.captions={captions!r} does not exist")
        if not sizes or any(len(size) != 2 for size in sizes):
            raise ValueError(f"data.sizes={sizes} must be a list of [height, width]")
        for name, value in (("frames", frames), ("stride", stride)):
            if value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1")
        if not 0 <= held_out < 1:
            raise ValueError(f"data.held_out={held_out} must be at least 0 and below 1")
        if text_length < 1:
            raise ValueError(f"data.text_length={text_length} must be at least 1")
        if fps is not None and fps <= 0:
            raise ValueError(f"data.fps={fps} must be positive")
        videos, classes = list_videos(Path(root), captions=table, held_out=held_out)
        super().__init__(
            batch_size=batch_size,
            channels=3,
            frames=frames,
            height=sizes[0][0],
            width=sizes[0][1],
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            num_classes=len(classes) or None,
            text_dim=embedding_width(videos),
            seed=seed,
            shuffle=shuffle,
            num_workers=num_workers,
        )
        self.root, self.class_names, self.listed = Path(root), classes, videos
        self.options = {
            "frames": frames,
            "sizes": [tuple(size) for size in sizes],
            "fps": fps,
            "stride": stride,
            "flip": flip,
            "text_length": text_length,
        }
        self.skipped: list[str] = []
        self.broken: Counter[str] = Counter()

    def readable(self) -> Iterator[Video]:
        """The videos that can be opened and are long enough, in order; the others go to `skipped`."""

        def look(video: Video) -> Video | str:
            try:
                info = probe(video.path)
            except UnreadableVideo as error:
                return str(error)
            needed = (self.frames - 1) * self.options["stride"] / (self.options["fps"] or info.fps) + 1 / info.fps
            if info.seconds < needed - 1e-3:
                return f"{video.path} lasts {info.seconds:.2f} s, and a clip {needed:.2f} s"
            return Video(video.path, video.split, video.label, video.caption, video.embedding, info)

        self.skipped = []
        with ThreadPoolExecutor(16) as pool:
            for found in pool.map(look, self.listed):
                if isinstance(found, str):
                    self.skipped.append(found)
                else:
                    yield found

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:
            return
        videos = list(self.readable())
        if self.skipped:
            _say(f"{len(self.skipped)} of {len(self.listed)} videos are left out", self.skipped)
        parts = {split: [video for video in videos if video.split == split] for split in SPLITS}
        if not parts["train"]:
            first = f", the first because {self.skipped[0]}" if self.skipped else ""
            raise ValueError(
                f"data.root={str(self.root)!r}: none of its {len(self.listed)} videos can be trained on{first}"
            )
        if not (parts["val"] or parts["test"]):
            _say("there are no videos to validate on, and one of training stands in", [str(parts["train"][0].path)])
        parts["val"] = parts["val"] or parts["test"] or parts["train"][:1]
        parts["test"] = parts["test"] or parts["val"]
        for split, some in parts.items():
            infos = [video.info for video in some]
            buckets = [nearest_bucket(i.height, i.width, self.options["sizes"]) for i in infos if i is not None]
            self.datasets[split] = ClipDataset(some, buckets, options=self.options, training=split == "train")

    def _sampler(self, split: str, **options: Any) -> BucketSampler:
        return BucketSampler(self.datasets[split].buckets, **options)  # pyright: ignore[reportAttributeAccessIssue]

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Takes note of the files that could not be decoded."""
        for reports in batch.pop("broken", ()):
            self.broken.update(reports.splitlines())
        return batch

    def teardown(self, stage: str) -> None:
        if self.broken and stage == "fit":
            _say(f"{len(self.broken)} videos could not be decoded and were replaced by others", sorted(self.broken))


def _say(what: str, reasons: Sequence[str], most: int = 20) -> None:
    shown = [f"  {reason}" for reason in reasons[:most]]
    more = [f"  and {len(reasons) - most} more"] if len(reasons) > most else []
    warnings.warn("\n".join([f"{what}:", *shown, *more]), stacklevel=2)
