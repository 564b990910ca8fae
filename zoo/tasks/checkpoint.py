"""Checkpoints that are whole or not there, and finding the newest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


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
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def newest_checkpoint(experiment: Path) -> Path | None:
    """The `last.ckpt` written last under an experiment's runs `experiment/*/checkpoints`, or None."""
    found = [path for path in experiment.glob("*/checkpoints/last.ckpt") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
