"""Checkpoints that are whole or not there, finding the newest, and reading one that may be anything."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ...weights.low_bit import admit_low_bit
from ...weights.transfer import NO_SPACE
from ..data.foreign import about

PARTS = ("pytorch-lightning_version", "state_dict", "loops", "optimizer_states", "callbacks")
DAMAGED = (OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, which takes its name once it is complete; after an error it is removed.

    Raises:
        OSError: with `path` as its file name, when the disk is full or cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        failed = error if isinstance(error, OSError) else error.__context__
        if not isinstance(failed, OSError):
            raise
        raise OSError(failed.errno, failed.strerror, str(path)) from error  # a failed write does not know its file
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Gives an OSError inside that knows no file, as of a write to a full disk, the name of the folder.

    Raises:
        OSError: with a file name.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes next to the target, flushes to the disk, then renames: a process killed at any moment leaves the old file.

    Lightning's own writer goes through the system's temporary folder, and a move from there to another file system is
    a copy that can be cut short.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise TypeError(f"storage_options={storage_options!r} is not supported: checkpoints are local files")
        with replacing(Path(path)) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self,
        path: str | os.PathLike,
        map_location: Callable | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        return _load(Path(path), map_location=map_location, weights_only=weights_only)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of a training run; its tensors are read from the disk only when they are used.

    Raises:
        ValueError: a folder, a damaged file or one of another program; the message names the file.
    """
    if path.is_dir():
        inside = path / "checkpoints" / "last.ckpt"
        hint = f"pass ckpt_path={inside}" if inside.is_file() else "expected a file such as RUN/checkpoints/last.ckpt"
        raise ValueError(f"ckpt_path={str(path)!r} is a folder: {hint}")
    checkpoint = _load(path, map_location="cpu", weights_only=True, mmap=True)
    missing = [part for part in PARTS if not isinstance(checkpoint, dict) or part not in checkpoint]
    if missing:
        raise ValueError(f"ckpt_path={str(path)!r} is no checkpoint of a training run: it has no {', '.join(missing)}")
    return checkpoint


def _load(path: Path, **options: Any) -> Any:
    with about("ckpt_path", path, *DAMAGED):
        if not zipfile.is_zipfile(path):  # its directory is at the end
            raise ValueError("it is empty" if not path.stat().st_size else "it is cut short, or no file of torch.save")
        try:
            return torch.load(path, **options)
        except pickle.UnpicklingError as error:
            if admit_low_bit(error):
                return torch.load(path, **options)
            raise ValueError("it holds more than tensors and plain values, which only code could make") from error


def newest_checkpoint(experiment: Path) -> Path | None:
    """The `last.ckpt` written last under an experiment's runs `experiment/*/checkpoints`, or None."""
    found = [path for path in experiment.glob("*/checkpoints/last.ckpt") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
