"""Files of images, by split and class: folders of classes, with splits or without, or a table of labels."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.utils import natural_key

from .classes import ClassTable, listed
from .names import say

SUFFIXES = (
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff")
    + (".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2")
)  # fmt: skip
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
    "test": ("test", "testing"),
}
SPLIT_NAMES = {name: split for split, names in SPLITS.items() for name in names}
TABLE = "labels.csv"
FILE_COLUMNS, LABEL_COLUMNS = ("file", "file_name", "filename"), ("label", "class")
JUNK = ("thumbs.db", "desktop.ini")  # that systems leave behind; hidden files are left out, too
Image = tuple[str, str]  # path, class


@dataclass
class Scan:
    """Images below a folder: those in folders of classes, and what else there is."""

    images: list[Image] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)  # images in no class
    others: Counter[str] = field(default_factory=Counter)  # files that are no images, by suffix
    empty: list[str] = field(default_factory=list)  # class folders without an image


@dataclass
class Listing:
    """Images of each split, in natural order of their paths.

    Args:
        images: by "train", "val" and "test", which is "val" again where there is no test.
        places: folder or table of each split.
    """

    images: dict[str, list[Image]]
    places: dict[str, str]

    def classes(self, split: str) -> set[str]:
        return {name for _, name in self.images[split]}

    def number(self, table: ClassTable | None) -> ClassTable:
        """The table that numbers the classes of all splits: the given one, or that of the training images.

        Raises:
            ValueError: a split has images of a class that the table does not have.
        """
        owner = "training" if table is None else "data.class_names"
        table = table or ClassTable.of(self.classes("train"))
        for split, place in self.places.items():
            found = self.classes(split)
            table.check(found, where=place, owner=owner)
            missing = [name for name in table.names if name not in found]
            if missing:
                say(f"{place} has no {split} images of {len(missing)} of {len(table)} classes: {listed(missing)}")
        return table


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _circular(path: str) -> bool:
    """Return whether a link leads to a folder that contains it."""
    inside = os.path.realpath(os.path.dirname(path)) + os.sep
    return os.path.islink(path) and inside.startswith(os.path.realpath(path) + os.sep)


def _walk(folder: Path, closed: list[OSError]) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`: sorted, through links but not in circles, without anything hidden; errors go to `closed`."""
    for place, folders, files in os.walk(folder, followlinks=True, onerror=closed.append):
        visible = (name for name in folders if not name.startswith("."))
        folders[:] = sorted(name for name in visible if not _circular(os.path.join(place, name)))
        yield place, folders, sorted(name for name in files if not name.startswith("."))


def scan(folder: Path) -> Scan:
    """The images below a folder; the folder right below it names the class of an image, however deep it lies."""
    found, closed = Scan(), list[OSError]()
    for place, folders, files in _walk(folder, closed):
        below = os.path.relpath(place, folder)
        if below == os.curdir:
            found.empty = folders.copy()
        for name in files:
            path = os.path.join(place, name)
            if not is_image(name):
                found.others[os.path.splitext(name)[1].lower() or name] += name.lower() not in JUNK
            elif below == os.curdir:
                found.loose.append(path)
            else:
                found.images.append((path, below.split(os.sep, 1)[0]))
    filled = {name for _, name in found.images}
    found.empty = [name for name in found.empty if name not in filled]
    found.images.sort(key=lambda image: (natural_key(image[0]), image[0]))
    if closed:
        say(f"in {folder} are folders that cannot be read, which are left out", [str(error) for error in closed])
    return found


def _say_left_out(found: Scan, folder: Path) -> None:
    if found.empty:
        say(f"in {folder} are folders without images, which are no classes: {listed(found.empty)}")
    if found.loose:
        say(f"in {folder} are images in no folder of a class, which are left out: {len(found.loose)}")
    if +found.others:
        kinds = [f"{suffix} ({count})" for suffix, count in (+found.others).most_common()]
        say(f"in {folder} are files that are no images, which are left out: {listed(kinds)}")


def _share(name: str, seed: int) -> float:
    """0 to 1 by name and seed alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest()[:6], "big") / 2**48


def hold_out(images: Sequence[Image], *, root: Path, fraction: float, seed: int) -> tuple[list[Image], list[Image]]:
    """Training and validation images, about `fraction` of each class to validate on, by the hash of their paths.

    An image keeps its place when others are added: below the fraction it is held out. A class with two images and none
    below gives the one with the least hash, and a class with all below keeps the one with the greatest to train on; so
    no image that was trained on is ever validated on because others came.
    """
    classes: dict[str, list[tuple[float, Image]]] = defaultdict(list)
    for image in images:
        name = os.path.relpath(image[0], root).replace(os.sep, "/")
        classes[image[1]].append((_share(name, seed), image))
    held: set[Image] = set()
    for members in classes.values():
        members.sort()
        below = sum(share < fraction for share, _ in members)
        count = min(max(below, 1), len(members) - 1)
        held.update(image for _, image in members[:count])
    return [image for image in images if image not in held], [image for image in images if image in held]


def folder_of(root: Path, split: str) -> Path | None:
    """The folder of a split, None where there is none; the exact name comes before other cases of it."""
    exact = {path.name: path for path in sorted(root.iterdir()) if path.is_dir()}
    lower = {name.lower(): path for name, path in exact.items()}
    return next((names[name] for names in (exact, lower) for name in SPLITS[split] if name in names), None)


def _no_train(root: Path) -> FileNotFoundError:
    found = listed(sorted(path.name for path in root.iterdir() if path.is_dir())) or "no folder at all"
    return FileNotFoundError(f"data.root={str(root)!r} has no folder for the split 'train'; it holds {found}")


def _check_rivals(root: Path, train: Path) -> None:
    """Refuses a training folder that may as well be a class among others."""
    others = [path for path in sorted(root.iterdir()) if path.is_dir() and path != train]
    scans = {path.name: scan(path) for path in others if not path.name.startswith(".")}
    rivals = [name for name, found in scans.items() if found.images or found.loose]
    if rivals:
        raise ValueError(
            f"data.root={str(root)!r}: {train.name} may be the training split or a class beside {listed(rivals)}: "
            f"add a folder val with the classes of {train.name}, or rename {train.name}"
        )


def _list_splits(root: Path, scans: dict[str, tuple[Path, Scan]], *, fraction: float, seed: int) -> Listing:
    """Of a root with a training folder of classes."""
    for folder, found in scans.values():
        if not found.images:
            raise ValueError(f"data.root={str(root)!r}: {folder} holds no images in folders of classes")
        _say_left_out(found, folder)
    if len(scans) == 1:
        _check_rivals(root, scans["train"][0])
    images = {split: found.images for split, (_, found) in scans.items()}
    places = {split: str(folder) for split, (folder, _) in scans.items()}
    if "val" not in images:
        images["train"], images["val"] = hold_out(images["train"], root=root, fraction=fraction, seed=seed)
        places["val"] = places["train"]
        say(
            f"data.root={str(root)!r} has no folder for the split 'val': {len(images['val'])} of "
            f"{len(images['train']) + len(images['val'])} images of {places['train']} are held out to validate on"
        )
    return Listing(images, places)


def _list_classes(root: Path, *, fraction: float, seed: int) -> Listing:
    """Of a root that holds folders of classes and no splits."""
    found = scan(root)
    names = {name for _, name in found.images}
    split_names = sorted(name for name in names if name.lower() in SPLIT_NAMES)
    if len(split_names) > 1 or names == set(split_names):
        if "train" in (SPLIT_NAMES[name.lower()] for name in split_names):
            raise ValueError(
                f"data.root={str(root)!r}: {listed(split_names)} hold no images in folders of classes; where a table "
                f"has the classes, pass data.labels=FILE.csv"
            )
        if names:
            raise _no_train(root)
    if not names:
        kinds = f", but {listed(f'{n} {kind}' for kind, n in found.others.items())}" if +found.others else ""
        raise ValueError(f"data.root={str(root)!r} holds no images in folders of classes{kinds}")
    _say_left_out(found, root)
    train, val = hold_out(found.images, root=root, fraction=fraction, seed=seed)
    return Listing({"train": train, "val": val}, {"train": str(root), "val": str(root)})


def list_folder(root: Path, *, fraction: float, seed: int) -> Listing:
    """`root/train/CLASS/*.jpg` with `val` and `test` beside `train`, or `root/CLASS/*.jpg`.

    Args:
        root: the folder.
        fraction: of each class to validate on where there is no folder for it.
        seed: of that choice.

    Raises:
        FileNotFoundError: there is a split, but none for training.
        ValueError: there are no images in folders of classes, or a folder may be a split or a class.
    """
    folders = {split: folder for split in SPLITS if (folder := folder_of(root, split))}
    scans = {split: (folder, scan(folder)) for split, folder in folders.items()}
    if "train" in scans and scans["train"][1].images:
        return _list_splits(root, scans, fraction=fraction, seed=seed)
    if "train" not in scans and any(found.images for _, found in scans.values()):
        raise _no_train(root)
    return _list_classes(root, fraction=fraction, seed=seed)


def table_rows(
    path: Path, *, fold: Callable[[str], str] = str.lower, key: str = "data.labels"
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows of a table with a header, separated by commas, semicolons or tabs.

    Args:
        path: of the table.
        fold: what names of columns go through.
        key: of the configuration, for errors.

    Raises:
        ValueError: it is no such table.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=header.count))
            columns = [fold(column.strip()) for column in next(reader, [])]
            for row in reader:
                if any(cell.strip() for cell in row):
                    yield reader.line_num, dict(zip(columns, (cell.strip() for cell in row), strict=False))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{key}={str(path)!r} is no table of text in UTF-8: {error}") from error


def _cell(row: dict[str, str], names: Sequence[str], *, line: int, table: Path) -> str:
    """The first column of these that has something in it."""
    for name in names:
        if row.get(name):
            return row[name]
    columns = "is empty" if any(name in row for name in names) else f"is missing; there are {listed(row)}"
    raise ValueError(f"data.labels={str(table)!r}, line {line}: the column {names[0]} {columns}")


def read_parts(
    rows: Iterable[tuple[int, dict[str, str]]],
    target_of: Callable[[int, dict[str, str]], Any],
    *,
    table: Path,
    root: Path,
    found: dict[str, Any],
) -> dict[str, list[str]]:
    """Paths of a table by split, "" where the row says none, in natural order.

    Args:
        rows: line numbers and rows, see `table_rows`.
        target_of: the target of a row.
        table: they are of, for messages.
        root: that files start from.
        found: where the target of each path goes.

    Raises:
        FileNotFoundError: files of the table are not there.
        ValueError: no column `file`, a split that is unknown, a file with two targets or in two splits.
    """
    parts: dict[str, list[str]] = {split: [] for split in (*SPLITS, "")}
    splits: dict[str, str] = {}
    missing, count = [], 0
    for line, row in rows:
        lower = {column.lower(): cell for column, cell in row.items()}
        name = _cell(lower, FILE_COLUMNS, line=line, table=table).replace("\\", "/")
        target = target_of(line, row)
        split = SPLIT_NAMES.get(lower.get("split", "").lower(), lower.get("split", ""))
        if split not in parts:
            raise ValueError(
                f"data.labels={str(table)!r}, line {line}: split={split!r} must be one of {', '.join(SPLITS)}"
            )
        path, count = str(root / name), count + 1
        if found.setdefault(path, target) != target or splits.setdefault(path, split) != split:
            raise ValueError(f"data.labels={str(table)!r}, line {line}: {name} has another label or split further up")
        if not os.path.isfile(path):
            missing.append(f"{path} (line {line})")
        parts[split].append(path)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {count} files of data.labels={str(table)!r} do not exist, the first is {missing[0]}"
        )
    for paths in parts.values():
        paths.sort(key=lambda path: (natural_key(path), path))
    return parts


def list_table(table: Path, *, root: Path, fraction: float, seed: int) -> Listing:
    """Images and classes of a table with the columns `file` (or `file_name`), `label` and, if wanted, `split`.

    Args:
        table: a .csv file.
        root: that `file` starts from.
        fraction: of each class to validate on where no row says so: of the rows without a split, or where no row is in
            the split val, of those to train on.
        seed: of that choice.

    Raises:
        FileNotFoundError: files of the table are not there.
        ValueError: a column is missing, a split unknown, a file in two classes or splits; the message names the line.
    """
    labels: dict[str, str] = {}

    def label_of(line: int, row: dict[str, str]) -> str:
        return _cell(row, LABEL_COLUMNS, line=line, table=table)

    paths = read_parts(table_rows(table), label_of, table=table, root=root, found=labels)
    parts = {split: [(path, labels[path]) for path in some] for split, some in paths.items()}
    undecided = parts.pop("")
    if undecided:
        train, val = hold_out(undecided, root=root, fraction=fraction, seed=seed)
        parts["train"], parts["val"] = parts["train"] + train, parts["val"] + val
    elif not parts["val"]:
        parts["train"], parts["val"] = hold_out(parts["train"], root=root, fraction=fraction, seed=seed)
    if not parts["train"]:
        raise ValueError(f"data.labels={str(table)!r} has no rows to train on")
    images = {split: some for split, some in parts.items() if some}
    return Listing(images, dict.fromkeys(images, str(table)))


def _is_needed(table: Path, root: Path) -> bool:
    """Return whether `root/labels.csv` gives the classes: it has the columns, and no training folder has classes."""
    train = folder_of(root, "train")
    if train and scan(train).images:
        return False
    columns = next((row.keys() for _, row in table_rows(table)), set())
    if columns & set(FILE_COLUMNS) and columns & set(LABEL_COLUMNS):
        return True
    say(f"{table} has no columns file and label and tells no classes; there are {listed(columns)}")
    return False


def list_images(root: Path, *, labels: str | None, fraction: float, seed: int) -> Listing:
    """The images of a folder, by its table if `labels` names one or `root/labels.csv` is all that tells the classes.

    Args:
        root: the folder.
        labels: path of a .csv file, here or in `root`; None: `root/labels.csv`, unless folders of splits hold classes.
        fraction, seed: see `list_folder` and `list_table`.

    Raises:
        FileNotFoundError, ValueError: see there; or there are none to validate on.
    """
    table = root / TABLE if labels is None else Path(labels) if Path(labels).is_file() else root / labels
    if labels is None and not (table.is_file() and _is_needed(table, root)):
        table = None
    elif not table.is_file():
        raise FileNotFoundError(f"data.labels={labels!r} does not exist, nor in data.root={str(root)!r}")
    if table is None:
        listing = list_folder(root, fraction=fraction, seed=seed)
    else:
        listing = list_table(table, root=root, fraction=fraction, seed=seed)
    if not listing.images.get("val"):
        raise ValueError(
            f"{listing.places['train']} leaves nothing to validate on: a class needs two images, or pass a folder val"
        )
    return listing
