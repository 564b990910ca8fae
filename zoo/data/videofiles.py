"""Videos of a folder with their splits, classes and captions: by folders, by a table, by text files beside them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.utils import natural_key

from .classes import ClassTable, listed
from .clips import PICTURES, SUFFIXES, VideoInfo
from .foreign import about
from .names import say

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
    "test": ("test", "testing"),
}
SPLIT_NAMES = {name: split for split, names in SPLITS.items() for name in names}
TABLES = ("metadata.csv", "metadata.jsonl")
COLUMNS = ("file_name", "caption", "split", "embedding", "repeats")


@dataclass(frozen=True)
class Video:
    """A file of the folder and what is known of it; `repeats` is how often it comes in an epoch of training."""

    path: Path
    split: str
    label: int = 0
    caption: str = ""
    embedding: Path | None = None
    repeats: int = 1
    info: VideoInfo | None = None


def _share(name: str) -> float:
    """0 to 1 by the name alone, so that a file stays in its split when others come or go."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


# tables


def _read_text(path: Path) -> str:
    """A file of UTF-8, without the mark that Excel puts in front."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not encoded in UTF-8 (byte {error.object[error.start]:#04x} at {error.start}): save it "
            "as UTF-8; spreadsheets call that CSV UTF-8"
        ) from error


def _csv_rows(path: Path) -> Iterator[dict[str, str]]:
    text = _read_text(path)
    separator = max(",;\t", key=text.split("\n", 1)[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        if "file_name" not in columns:
            raise ValueError(f"data.captions={str(path)!r} has the columns {listed(columns) or 'of no header'}")
        for row in reader:
            if len(row) > len(columns):
                raise ValueError(
                    f"data.captions={str(path)!r}, line {reader.line_num}: {len(row)} cells under {len(columns)} "
                    f"columns; a caption that holds {separator!r} stands in double quotes"
                )
            if any(cell.strip() for cell in row):  # spreadsheets write empty rows at the end
                yield dict(zip(columns, row, strict=False))
    except csv.Error as error:
        raise ValueError(f"data.captions={str(path)!r}, line {reader.line_num}: {error}") from error


def _json_rows(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"data.captions={str(path)!r} is no JSON lines file: line {number}: {error}"
                ) from error


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a .csv file, separated by commas, semicolons or tabs, or of a .jsonl file; in UTF-8.

    Raises:
        ValueError: another kind of file or encoding, a row that is no JSON object or of other than text, no column
            `file_name`. The message names the file and what was found.
    """
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise ValueError(f"data.captions={str(path)!r} must be a .csv or .jsonl file")
    try:
        rows = list(_csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path))
    except ValueError as error:
        raise ValueError(f"{error}; it must have rows with file_name, and caption for text") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not str(row.get("file_name") or "").strip():
            found = f"the columns {listed(row)}" if isinstance(row, dict) else f"{row!r}"
            raise ValueError(
                f"data.captions={str(path)!r} must have rows with file_name, and caption for text; row {number} has "
                f"{found}" + (", and file_name is empty" if isinstance(row, dict) and "file_name" in row else "")
            )
        for name in COLUMNS:
            if not isinstance(row.get(name) or "", (str, int) if name == "repeats" else str):
                raise ValueError(f"data.captions={str(path)!r}, row {number}: {name}={row[name]!r} must be text")
    if not rows:
        raise ValueError(
            f"data.captions={str(path)!r} must have rows with file_name, and caption for text; it has none"
        )
    return rows


def _from_table(root: Path, table: Path, held_out: float) -> list[Video]:
    videos = []
    for row in read_table(table):
        name = row["file_name"].strip().replace("\\", "/")
        split = row.get("split") or ""
        split = SPLIT_NAMES.get(split.strip().lower(), split)
        if not split:
            folder, *file = Path(name).parts
            by_hash = "val" if _share(Path(name).as_posix()) < held_out else "train"
            split = SPLIT_NAMES.get(folder.lower(), by_hash) if file else by_hash
        if split not in SPLITS:
            raise ValueError(f"split={split!r} of {name} in {table} must be one of {', '.join(SPLITS)}")
        embedding = root / row["embedding"] if row.get("embedding") else None
        repeats = str(row.get("repeats") or "1").strip()
        if not repeats.isdecimal() or int(repeats) < 1:
            raise ValueError(f"repeats={repeats!r} of {name} in {table} must be an integer of at least 1")
        told: dict[str, Any] = {"caption": row.get("caption") or "", "embedding": embedding, "repeats": int(repeats)}
        videos.append(Video(root / name, split, **told))
    return videos


# folders


def _below(folder: Path, suffixes: Sequence[str], above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The files of these kinds below a folder, through links but not in circles, without anything hidden."""
    above = above | {os.path.realpath(folder)}
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise ValueError(f"the folder {str(folder)!r} of data.root cannot be read: {error.strerror}") from error
    for path in entries:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if os.path.realpath(path) not in above:
                yield from _below(path, suffixes, above)
        elif path.suffix.lower() in suffixes:
            yield path  # a link to nowhere, too: it is listed as a file that cannot be opened


def _videos(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """In natural order, as `ClassTable` and timm have it."""
    return sorted(_below(folder, suffixes), key=lambda path: (natural_key(str(path)), str(path)))


def _split_folders(root: Path, found: Sequence[Path]) -> dict[str, str]:
    """Folders of splits right below the root, by name → split; none where `train` is a class beside others.

    Raises:
        ValueError: there are splits, but none for training, or `train` may be a split or a class.
    """
    folders: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for path in found:
        *below, _ = path.relative_to(root).parts
        if below:
            folders[below[0]].append(tuple(below[1:]))
    splits = {name: SPLIT_NAMES[name.lower()] for name in folders if name.lower() in SPLIT_NAMES}
    others = sorted(folders.keys() - splits.keys(), key=natural_key)
    if not splits or (others and len(splits) == 1 and not any(map(any, folders[next(iter(splits))]))):
        return {}  # no splits, or one class that is called like one: it holds no folders of classes
    if "train" not in splits.values():
        raise ValueError(f"data.root={str(root)!r} has no folder for the split 'train'; it holds {listed(folders)}")
    if others and len(splits) == 1:
        name = next(iter(splits))
        raise ValueError(
            f"data.root={str(root)!r}: {name} may be the training split or a class beside {listed(others)}: add a "
            f"folder val with the same classes, or rename {name}"
        )
    return splits


def _hold_out(root: Path, classes: dict[Path, str], held_out: float) -> dict[Path, str]:
    """Splits by the hashes of names; each class keeps a video to train on, that with the greatest hash."""
    shares = {path: _share(path.relative_to(root).as_posix()) for path in classes}
    kept: dict[str, Path] = {}
    for path, name in classes.items():
        if name not in kept or shares[path] > shares[kept[name]]:
            kept[name] = path
    return {
        path: "val" if shares[path] < held_out and kept[name] != path else "train" for path, name in classes.items()
    }


def _number(videos: Iterable[tuple[str, str]], root: Path, given: ClassTable | None) -> ClassTable | None:
    """The table that numbers the classes of all splits: the given one, or that of the training videos, if any.

    Args:
        videos: split and class of each, "" for none.

    Raises:
        ValueError: a split has a class that the table lacks.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for split, name in videos:
        found[split] |= {name} - {""}
    if not any(found.values()):
        return None
    if not given and not found["train"]:
        raise ValueError(f"data.root={str(root)!r} has classes in {listed(found)}, and none to train on")
    table = given or ClassTable.of(found["train"])
    for split in found:
        unknown = sorted(found[split] - table.labels.keys(), key=natural_key)
        if unknown:
            owner = "data.class_names" if given else "training"
            raise ValueError(
                f"data.root={str(root)!r} has {split} videos of {listed(unknown)}, which {owner} does not have: its "
                f"classes are {listed(table.names)}"
            )
        missing = [name for name in table.names if name not in found[split]]
        if missing and found[split]:
            say(f"{len(missing)} of {len(table)} classes have no {split} videos: {listed(missing)}")
    return table


def _with_captions(videos: list[Video], root: Path) -> list[Video]:
    """Captions from text files that lie beside the videos under the same name, where there are some."""
    texts = {video.path: video.path.with_suffix(".txt") for video in videos}
    found = {path for path, text in texts.items() if text.is_file()}
    if not found:
        return videos
    lacking = [str(path) for path in texts if path not in found]
    if lacking:
        say(f"{len(lacking)} of {len(videos)} videos of {root} have no caption: there is no .txt file beside", lacking)
    return [replace(v, caption=_read_text(texts[v.path]).strip()) if v.path in found else v for v in videos]


def list_videos(
    root: Path,
    *,
    captions: Path | None,
    held_out: float,
    class_names: Sequence[str] | None = None,
    pictures: bool = False,
) -> tuple[list[Video], list[str]]:
    """The files of a folder, in natural order, and the names of its classes by label (none with a table).

    The folder right below a split, or below the root where there are no splits, names the class of a video, however
    deep it lies. Classes are numbered by the training videos.

    Args:
        root: the folder.
        captions: the table, if there is one; else text files beside the videos count.
        held_out: share of the videos to validate on where no folder or row says it.
        class_names: of the classes by label, to keep the numbers of another run; None: those to train on.
        pictures: image files are listed, too.

    Raises:
        ValueError: no videos, a class that training lacks, a folder that may be a split or a class, a table that
            cannot be read.
    """
    if captions is not None:
        return _from_table(root, captions, held_out), []
    suffixes = (*SUFFIXES, *PICTURES) if pictures else SUFFIXES
    found = _videos(root, suffixes)
    if not found:
        raise ValueError(f"data.root={str(root)!r} holds no videos ({', '.join(suffixes)})")
    folders = _split_folders(root, found)
    below = {path: path.relative_to(root).parts[:-1] for path in found}
    if folders:
        strays = [str(path) for path, parts in below.items() if not parts or parts[0] not in folders]
        if strays:
            say(f"{len(strays)} videos of {root} lie outside the folders {listed(folders)} and are left out", strays)
        below = {path: parts for path, parts in below.items() if parts and parts[0] in folders}
        splits = {path: folders[parts[0]] for path, parts in below.items()}
        classes = {path: parts[1] if len(parts) > 1 else "" for path, parts in below.items()}
    else:
        classes = {path: parts[0] if parts else "" for path, parts in below.items()}
        splits = _hold_out(root, classes, held_out)
    given = ClassTable(tuple(map(str, class_names))) if class_names else None
    table = _number(((splits[path], name) for path, name in classes.items()), root, given)
    if table is not None and "" in classes.values():
        loose = [str(path) for path, name in classes.items() if not name]
        say(f"{len(loose)} videos of {root} lie in no folder of a class and are left out", loose)
        classes = {path: name for path, name in classes.items() if name}
    labels = table.labels if table else {"": 0}
    videos = [Video(path, splits[path], label=labels[name]) for path, name in classes.items()]
    return _with_captions(videos, root), list(table.names) if table else []


# embeddings


def embedding_width(videos: Sequence[Video]) -> int | None:
    """Channels of the embeddings, read from the files' headers; None where no video has one.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: only some videos have an embedding, or of another width than the first, or a file is damaged; the
            message names the row or the file.
    """
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
        with about("embedding", path, SafetensorError, OSError), safe_open(path, framework="pt") as file:
            shape = file.get_slice("text").get_shape() if "text" in file.keys() else []  # noqa: SIM118
        if len(shape) != 2 or shape[1] != next(iter(widths.values()), shape[1]):
            wanted = f"[L, {next(iter(widths.values()))}]" if widths else "[L, D]"
            raise ValueError(f"embedding={str(path)!r} of {video.path.name} has text of {shape}, expected {wanted}")
        widths[path] = shape[1]
    return next(iter(widths.values()), None)
