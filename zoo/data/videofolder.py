"""Your own videos: a folder a class, or a table with captions."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from .buckets import BucketSampler
from .clip_dataset import ClipDataset, fit_clip, read_embedding, too_short
from .clips import UnreadableVideo, probe
from .names import say
from .video import VideoData
from .videofiles import SPLITS, TABLES, Video, embedding_width, list_videos, read_table

__all__ = ["ClipDataset", "Video", "VideoFolder", "list_videos", "read_embedding", "read_table"]


class VideoFolder(VideoData):
    """Clips `[B, 3, frames, H, W]` in -1..1 of the videos of a folder.

    With classes: `root/train/CLASS/*.mp4` and `root/val/CLASS/*.mp4` (`test` if there is one), or `root/CLASS/*.avi`,
    of which `held_out` are validated on; the classes of the training videos are numbered in natural order. With
    captions: a table with `file_name` (from `root`), `caption` and, if wanted, `split` and `embedding`, a safetensors
    file with the caption's `text` `[L, D]`; or, without a table, text files beside the videos (`0.txt` of `0.mp4`).

    Links to folders are followed; hidden files and folders are left out. Frames are turned as their file says, and
    stretched where its pixels are not square.

    Files that cannot be opened, or are too short, are left out; how many and which is said once. Those that turn out to
    be undecodable later are replaced by others in training, do not count in evaluation, and are listed at the end.

    Args:
        root: the folder.
        captions: the table; None: `root/metadata.csv` or `.jsonl` if there is one.
        frames: of a clip; several: a video gives the longest clip that it is long enough for, and every batch has one
            length. With 1 among them, images of the folder are clips of one frame.
        sizes: `(height, width)` of the clips, one or several; a video goes to the size whose aspect ratio is nearest,
            and every batch has one size.
        fps: to take frames at, whatever the video's own; None: its own.
        stride: every how many of those frames.
        num_repeats: times that each training video comes in an epoch, with a time, place and flip of its own; the
            column `repeats` of the table multiplies it.
        held_out: share of the videos to validate on where no folder or table says it.
        flip: mirror half of the training clips.
        text_length: words that `text` is cut or padded to.
        class_names: of the classes by label, to keep the numbers of another run; None: those to train on.
        batch_size, seed, shuffle, num_workers: see `SeededData`.

    Raises:
        FileNotFoundError: the folder or the table is not there.
        ValueError: no videos, or none that can be read; classes that training lacks; a table that cannot be read, or of
            whose rows only some have an embedding, or of several widths.
    """

    def __init__(
        self,
        *,
        root: str | None,
        captions: str | None = None,
        batch_size: int = 8,
        frames: int | Sequence[int] = 16,
        sizes: Sequence[Sequence[int]] = ((64, 64),),
        fps: float | None = None,
        stride: int = 1,
        num_repeats: int = 1,
        held_out: float = 0.05,
        flip: bool = False,
        text_length: int = 64,
        class_names: Sequence[str] | None = None,
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
        if not sizes or any(isinstance(size, int) or len(size) != 2 or min(size) < 1 for size in sizes):
            raise ValueError(f"data.sizes={sizes} must be a list of [height, width]")
        counts = [frames] if isinstance(frames, int) else sorted(set(frames))
        if not counts or not all(isinstance(count, int) and count >= 1 for count in counts):
            raise ValueError(f"data.frames={frames} must be an integer of at least 1, or a list of such")
        for name, value in (("stride", stride), ("num_repeats", num_repeats)):
            if value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1")
        if not 0 <= held_out < 1:
            raise ValueError(f"data.held_out={held_out} must be at least 0 and below 1")
        if text_length < 1:
            raise ValueError(f"data.text_length={text_length} must be at least 1")
        if fps is not None and fps <= 0:
            raise ValueError(f"data.fps={fps} must be positive")
        options: dict[str, Any] = {"held_out": held_out, "class_names": class_names, "pictures": 1 in counts}
        videos, classes = list_videos(Path(root), captions=table, **options)
        super().__init__(
            batch_size=batch_size,
            channels=3,
            frames=counts[-1],
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
        self.num_repeats = num_repeats
        self.options = {
            "frames": counts,
            "sizes": [tuple(size) for size in sizes],
            "fps": fps,
            "stride": stride,
            "flip": flip,
            "text_length": text_length,
        }
        self.skipped: list[str] = []
        self.broken: Counter[str] = Counter()  # of training, replaced by others
        self.uncounted: Counter[str] = Counter()  # of evaluation

    @property
    def clip_sizes(self) -> tuple[str, list[tuple[int, ...]]]:
        counts, sizes = self.options["frames"], self.options["sizes"]
        shown = counts if len(counts) > 1 else counts[0]
        said = f"data.frames={shown} and data.sizes={[list(size) for size in sizes]}"
        return said, [(count, *size) for count in counts for size in sizes]

    @property
    def for_record(self) -> dict[str, Any]:
        """Keys of the configuration that only the data could fill in, for the run's record."""
        return {"class_names": self.class_names or None}

    def readable(self) -> Iterator[Video]:
        """The videos that can be opened and are long enough, in order; the others go to `skipped`."""

        def look(video: Video) -> Video | str:
            try:
                info = probe(video.path)
            except UnreadableVideo as error:
                return str(error)
            return too_short(video.path, fit_clip(self.options, info), info) or replace(video, info=info)

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
            say(f"{len(self.skipped)} of {len(self.listed)} videos are left out", self.skipped)
        parts = {split: [video for video in videos if video.split == split] for split in SPLITS}
        if not parts["train"]:
            first = f", the first because {self.skipped[0]}" if self.skipped else ""
            raise ValueError(
                f"data.root={str(self.root)!r}: none of its {len(self.listed)} videos can be trained on{first}"
            )
        if not (parts["val"] or parts["test"]):
            say("there are no videos to validate on, and one of training stands in", [str(parts["train"][0].path)])
        parts["val"] = parts["val"] or parts["test"] or parts["train"][:1]
        parts["test"] = parts["test"] or parts["val"]
        parts["train"] = [video for video in parts["train"] for _ in range(self.num_repeats * video.repeats)]
        for split, some in parts.items():
            self.datasets[split] = ClipDataset(some, options=self.options, training=split == "train")

    def _sampler(self, split: str, **options: Any) -> BucketSampler:
        return BucketSampler(self.datasets[split].buckets, **options)  # pyright: ignore[reportAttributeAccessIssue]

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Takes note of the files that could not be decoded."""
        reports = batch.pop("broken", ())
        for report, counts in zip(reports, batch["real"].tolist() if reports else (), strict=True):
            (self.broken if counts else self.uncounted).update(report.splitlines())
        return batch

    def teardown(self, stage: str) -> None:
        """Every rank says which of its files could not be decoded."""
        for files, what in ((self.broken, "were replaced by others"), (self.uncounted, "do not count in evaluation")):
            if files:
                named = "\n".join(f"  {reason}" for reason in sorted(files))
                warnings.warn(f"{len(files)} videos could not be decoded and {what}:\n{named}", stacklevel=2)
                files.clear()
