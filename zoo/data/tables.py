"""Images of a table with several labels, or with numbers, for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from .classes import ClassTable, listed, recorded
from .folders import FILE_COLUMNS, LABEL_COLUMNS, SPLITS, TABLE, hold_out, read_parts, table_rows
from .images import Files, Images, TransformedImages
from .loader import PADDING, EpochSampler
from .names import unknown_name

KINDS = ("labels", "values")
NOT_TARGETS = (*FILE_COLUMNS, "split")
Vectors = dict[str, list[float]]  # targets of each path


@dataclass(frozen=True)
class Table:
    """Images by split, and the targets of each.

    Attributes:
        paths: by "train", "val" and, if the table has it, "test".
        names: of the targets, in their order.
        targets: by path.
    """

    paths: dict[str, list[str]]
    names: tuple[str, ...]
    targets: Vectors

    def tensor(self, split: str) -> Tensor:
        """Targets of a split, `[images, len(names)]` float32."""
        rows = [self.targets[path] for path in self.paths[split]]
        return torch.tensor(rows, dtype=torch.float32).view(len(rows), len(self.names))


def _column(row: Mapping[str, str], names: Sequence[str]) -> str | None:
    """The first column, in any case, of these names."""
    lower = {column.lower(): column for column in row}
    return next((lower[name] for name in names if name in lower), None)


def _target_columns(row: Mapping[str, str], columns: Sequence[str] | None, *, table: Path) -> list[str]:
    """Columns of targets: the given ones, or all but those of file and split."""
    others = [column for column in row if column and column.lower() not in NOT_TARGETS]
    if columns is None and others:
        return others
    missing = [column for column in columns or () if column not in row]
    if missing or not columns:
        raise ValueError(
            f"data.columns={None if columns is None else list(columns)}: {table} has the columns {listed(row)}; "
            "targets are all but file and split, or those named here"
        )
    return list(columns)


def _number(row: Mapping[str, str], column: str, *, line: int, table: Path, accepted: Sequence[float] = ()) -> float:
    try:
        value = float(row.get(column, ""))
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (accepted and value not in accepted):
        wanted = "a finite number" if not accepted else "0 or 1"
        raise ValueError(f"data.labels={str(table)!r}, line {line}: {column}={row.get(column, '')!r} must be {wanted}")
    return value


def read_targets(
    table: Path, *, root: Path, kind: str, columns: Sequence[str] | None = None, separator: str = "|"
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Paths by split ("" where no row says it) and, for "labels" in one column, names of each path, else numbers.

    Args:
        table: a .csv file with the columns `file` and, if wanted, `split`.
        root: that `file` starts from.
        kind: "labels" or "values".
        columns: of the targets; None: of labels the column `label` or `labels`, or else all but file and split.
        separator: between the labels of a cell.

    Raises:
        FileNotFoundError: files of the table are not there.
        ValueError: a column is missing, a number is none, a file comes twice; the message names the line.
    """
    found: dict[str, Any] = {}
    rows = list(table_rows(table, fold=str))
    if not rows:
        raise ValueError(f"data.labels={str(table)!r} has no rows")
    label = _column(rows[0][1], (*LABEL_COLUMNS, "labels")) if kind == "labels" and columns is None else None
    told = _target_columns(rows[0][1], columns, table=table) if label is None else []
    accepted = (0.0, 1.0) if kind == "labels" else ()

    def targets_of(line: int, row: Mapping[str, str]) -> Any:
        if label is not None:
            return sorted({name.strip() for name in row.get(label, "").split(separator)} - {""})
        return {name: _number(row, name, line=line, table=table, accepted=accepted) for name in told}

    return read_parts(rows, targets_of, table=table, root=root, found=found), found


def _names_of(targets: Iterable[Any], names: Sequence[str] | None) -> tuple[str, ...]:
    """Names of targets: columns, or in natural order the labels."""
    targets = list(targets)
    if isinstance(targets[0], dict):
        return tuple(targets[0])
    return tuple(names) if names is not None else ClassTable.of(name for some in targets for name in some).names


def as_vectors(found: Mapping[str, Any], names: Sequence[str], *, where: str) -> Vectors:
    """Targets of each path in the order of `names`: numbers, or 1 for a label that an image has and 0 for others.

    Raises:
        ValueError: labels that are none of the names.
    """
    table = ClassTable(tuple(names))
    table.check({name for some in found.values() for name in some}, where=where)
    return {path: [float(some[n]) if isinstance(some, dict) else float(n in some) for n in names]
            for path, some in found.items()}  # fmt: skip


def list_targets(
    table: Path,
    *,
    root: Path,
    kind: str,
    columns: Sequence[str] | None,
    separator: str,
    names: Sequence[str] | None,
    fraction: float,
    seed: int,
) -> Table:
    """Images and targets of a table, split as it says, or else by the hash of their paths.

    Args:
        table, root, kind, columns, separator: see `read_targets`.
        names: labels in their order; None: those of the training images.
        fraction: of the images to validate on where no row says so.
        seed: of that choice.

    Raises:
        FileNotFoundError, ValueError: see `read_targets`; or nothing to train or validate on, or one label.
    """
    parts, found = read_targets(table, root=root, kind=kind, columns=columns, separator=separator)
    undecided = parts.pop("")
    if undecided or not parts["val"]:
        rest = undecided or parts["train"]
        train, val = hold_out([(path, "") for path in rest], root=root, fraction=fraction, seed=seed)
        parts["train"] = [path for path, _ in train] + (parts["train"] if undecided else [])
        parts["val"] += [path for path, _ in val]
    for split in ("train", "val"):
        if not parts[split]:
            raise ValueError(f"data.labels={str(table)!r} has no rows of the split {split!r}")
    names = _names_of((found[path] for path in parts["train"]), names)
    if kind == "labels" and len(names) < 2:
        raise ValueError(f"data.labels={str(table)!r} has the labels {list(names)}, and there must be two")
    targets = as_vectors(found, names, where=str(table))
    return Table({split: paths for split, paths in parts.items() if paths}, names, targets)


class WithTargets:
    """Puts the targets in place of the numbers of images in a batch; rows of those that do not count are NaN.

    Args:
        receive: what the batch goes through before.
        targets: of the split, `[images, T]`.
    """

    def __init__(self, receive: Callable[[Any], Any], targets: Tensor):
        self.receive, self.targets = receive, targets

    def __call__(self, batch: Any) -> list[Tensor]:
        images, numbers = self.receive(batch)
        targets = self.targets[numbers.clamp(min=0)]
        return [images, targets.masked_fill((numbers == PADDING)[:, None], math.nan)]


class ImageTable(TransformedImages):
    """Images `[B, C, H, W]` with targets `[B, T]` (float32) from a table; rows of images that do not count are NaN.

    Of `targets="labels"` an image has any number of labels, in one column with a separator or as columns of 0 and 1;
    of `targets="values"` a number in each column.

    Args:
        root: folder that the files of the table start from.
        labels: the .csv file, with the columns `file`, the targets and, if wanted, `split`; None: `root/labels.csv`.
        targets: "labels" or "values".
        columns: of the targets; None: of labels the column `label` or `labels`, else all but file and split.
        separator: between the labels of a cell.
        class_names: labels in their order, to keep that of another run; None: those of the training images.
        val_fraction, split_seed: of the images held out where the table does not say what to validate on.
        train_transform, eval_transform, augment: see `TransformedImages`.
        batch_size, img_size, mean, std, seed, shuffle, num_workers: see `ImageData`.

    Raises:
        FileNotFoundError: root, table, or one of its files is not there.
        ValueError: a table that is none; the message names the line.
    """

    fewest_classes = 1

    def __init__(
        self,
        *,
        root: str | None,
        batch_size: int,
        labels: str | None = None,
        targets: str = "labels",
        columns: Sequence[str] | None = None,
        separator: str = "|",
        class_names: Sequence[str] | None = None,
        img_size: int = 224,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        train_transform: Mapping[str, Any] | None = None,
        eval_transform: Mapping[str, Any] | None = None,
        augment: bool = True,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int | None = None,
    ):
        if targets not in KINDS:
            raise unknown_name("data.targets", targets, KINDS)
        if class_names is not None and targets == "values":
            raise ValueError(f"data.class_names={list(class_names)} are labels; values go by data.columns")
        if not separator:
            raise ValueError(f"data.separator={separator!r} must be at least one character")
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction} must be above 0 and below 1")
        table = find_table(root, labels)
        assert root is not None
        self.root, self.kind = str(root), targets
        self.table = list_targets(
            table,
            root=Path(root),
            kind=targets,
            columns=columns,
            separator=separator,
            names=class_names,
            fraction=val_fraction,
            seed=split_seed,
        )
        super().__init__(
            batch_size=batch_size,
            mean=mean,
            std=std,
            num_classes=len(self.table.names),
            img_size=img_size,
            classes=ClassTable(self.table.names),
            train_transform=train_transform,
            eval_transform=eval_transform,
            augment=augment,
            seed=seed,
            shuffle=shuffle,
            num_workers=num_workers,
        )

    @property
    def for_task(self) -> dict[str, Any]:
        facts = super().for_task | {"targets": self.kind}
        if self.kind == "labels":
            return facts
        values = self.table.tensor("train").double()
        mean, std = values.mean(0), values.std(0, correction=0)
        std = torch.where(std > 0, std, 1.0)
        return facts | {"value_mean": mean.tolist(), "value_std": std.tolist()}

    @property
    def for_record(self) -> dict[str, Any]:
        if self.kind == "values":
            return {"columns": list(self.table.names)}
        return recorded(self.class_names)

    @property
    def positive_weights(self) -> Tensor:
        """Training images without a label for one with it, `[labels]`; 1 for a label that none has."""
        with_it = self.table.tensor("train").sum(0)
        return torch.where(
            with_it > 0, (len(self.table.paths["train"]) - with_it).clamp(min=1) / with_it.clamp(min=1), 1.0
        )

    def _split_of(self, split: str) -> str:
        return split if split in self.table.paths else "val"

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:
            return
        for split in SPLITS:
            paths = self.table.paths[self._split_of(split)]
            reader = Files(list(zip(paths, range(len(paths)), strict=True)), root=self.root)
            self.datasets[split] = Images(
                self.root, reader=reader, input_img_mode=self.mode, transform=self._transform(split)
            )

    def _receiver(self, split: str, sampler: EpochSampler) -> Callable[[Any], Any]:
        return WithTargets(super()._receiver(split, sampler), self.table.tensor(self._split_of(split)))


def find_table(root: str | Path | None, labels: str | None) -> Path:
    """The table of a folder: the one that `labels` names, here or in the folder, or `root/labels.csv`.

    Raises:
        ValueError: no root.
        FileNotFoundError: the folder or the table is not there.
    """
    if root is None:
        raise ValueError("data.root is not set: pass data.root=FOLDER, which holds the images and labels.csv")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"data.root={str(root)!r} is not a folder")
    if labels is not None and Path(labels).is_file():
        return Path(labels)
    table = Path(root) / (labels or TABLE)
    if not table.is_file():
        raise FileNotFoundError(f"data.labels={labels or TABLE!r} does not exist, nor in data.root={str(root)!r}")
    return table
