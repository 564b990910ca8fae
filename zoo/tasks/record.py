"""Record in a run's folder: configuration, environment of every start, how the run ended."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from ..data.foreign import about
from .checkpoint import replacing
from .console import console, say
from .report import UNREADABLE, read_unreadable

# of what a run can depend on, whatever of it is installed
PACKAGES = (
    *("foveal", "torch", "torchvision", "triton", "timm", "diffusers", "lightning", "torchmetrics", "hydra-core"),
    *("omegaconf", "numpy", "pillow", "safetensors", "huggingface_hub", "scikit-learn", "matplotlib"),
    *("av", "peft", "accelerate", "transformers", "datasets", "bitsandbytes", "torchao"),
)


def _git_commit() -> str | None:
    """Commit of the checkout this package runs from, with "+changes" if files differ; None outside a checkout."""
    folder = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        run = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder:
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, Any]:
    """Environment of a run: command, commit, versions, hardware."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__  # says which CUDA or ROCm it is for
    return {
        "command": shlex.join(sys.argv),
        "time": _now(),
        "commit": _git_commit(),
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def starts_of(run_dir: Path) -> list[dict[str, Any]]:
    """The starts that a run's `environment.json` lists; none where there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    path = run_dir / "environment.json"
    if not path.exists():
        return []
    with about("environment.json", path, OSError, ValueError):
        starts = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise ValueError(f"{path} is no list of starts: remove it, and the run begins another one")
    return starts


def is_unfinished(run_dir: Path) -> bool:
    """Return whether the last start of a run was stopped or killed before it had measured everything."""
    starts = starts_of(run_dir)
    return bool(starts) and "ended" in starts[-1] and starts[-1]["ended"] is None


class Record(Callback):
    """Writes `config.yaml` and adds to `environment.json` when a run does its first step, not before: one that is
    refused leaves the records of its folder as they are.

    Args:
        config: of the run.
        run_dir: its folder.
        checkpoint: what it goes on from, if anything.
        changes: what the configuration changes since that, `(old, new)` by key.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        checkpoint: Path | None = None,
        changes: Mapping[str, tuple[Any, Any]] | None = None,
    ):
        self.config, self.run_dir = config, run_dir
        self.start = environment() | {
            "goes_on_from": str(checkpoint) if checkpoint else None,
            "changed": {key: list(values) for key, values in (changes or {}).items()},
            "ended": None,
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write()

    @rank_zero_only
    def _write(self) -> None:
        starts = starts_of(self.run_dir)
        if not starts or starts[-1].get("time") != self.start["time"]:  # spawned processes write for this one
            with replacing(self.run_dir / "config.yaml") as path:
                OmegaConf.save(self.config, path, resolve=True)
            _save([*starts, self.start], self.run_dir)

    @rank_zero_only
    def end(self, metrics: Mapping[str, float]) -> None:
        """Notes when the run ended and the values that it had measured last."""
        *before, last = starts_of(self.run_dir) or [self.start]
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        _save([*before, last | {"ended": {"time": _now(), "metrics": values}}], self.run_dir)


def _save(starts: list[dict[str, Any]], run_dir: Path) -> None:
    with replacing(run_dir / "environment.json") as path:
        path.write_text(json.dumps(starts, indent=2) + "\n", encoding="utf-8")


def _next_steps(run_dir: Path, shown: str) -> list[str]:
    """Commands that use what a run made; `shown` is its folder as a shell takes it."""
    if (run_dir / "pipeline" / "model_index.json").is_file():
        return [f"  foveal sample {shown} clips.gif"]
    tables = ("per_class.csv", "per_label.csv", "per_value.csv")
    if any((run_dir / name).is_file() for name in tables) and (run_dir / "checkpoints" / "last.ckpt").is_file():
        return [
            f"  foveal predict {shown} IMAGES --csv names.csv --sheet sheet.png",
            f"  foveal export {shown} FOLDER        (timm and the Hugging Face hub; FILE.onnx, FILE.pt2)",
        ]
    return []


@rank_zero_only
def print_summary(metrics: dict[str, float], run_dir: Path) -> None:
    """Prints the numbers of the test (or of validation) and where the pictures are."""
    split = next((split for split in ("test", "val", "train") if f"{split}/loss" in metrics), "train")
    units = {
        "acc1": ("accuracy", 100, ".2f", " %"),
        "acc5": ("top-5", 100, ".2f", " %"),
        "miou": ("mean intersection over union", 100, ".2f", " %"),
        "acc": ("pixels right", 100, ".2f", " %"),
        "map": ("mean average precision", 100, ".2f", " %"),
        "auroc": ("area under the ROC curve", 1, ".3f", ""),
        "f1": ("F1", 100, ".2f", " %"),
        "mae": ("mean absolute error", 1, ".4g", ""),
        "r2": ("R²", 1, ".4f", ""),
        "accuracy": ("accuracy of samples", 100, ".0f", " %"),
        "frechet": ("Fréchet distance", 1, ".1f", ""),
        "psnr": ("PSNR of luma", 1, ".2f", " dB"),
        "psnr_rgb": ("PSNR of RGB", 1, ".2f", " dB"),
        "psnr_jpeg": ("of JPEG", 1, ".2f", " dB"),
        "bpp": ("bits a pixel", 1, ".3f", ""),
        "style": ("distance to the style", 100, ".1f", " %"),
        "content": ("to the content", 100, ".1f", " %"),
        "exact": ("captions right in every word", 100, ".2f", " %"),
        "mpjpe": ("mean distance of joints", 1, ".4f", " m"),
        "srcc": ("rank correlation", 1, ".4f", ""),
        "loss": ("loss", 1, ".4f", ""),
    }
    numbers = ""
    for name, (label, scale, digits, unit) in units.items():
        if f"{split}/{name}" in metrics:
            numbers += f"  {label} {scale * metrics[f'{split}/{name}']:{digits}}{unit}"
    unreadable = sum(row["split"] == split for row in read_unreadable(run_dir))
    if unreadable:
        numbers += f"  ({unreadable} images could not be read and do not count)"
    shown = run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
    names = (
        "curves.png",
        "predictions.png",
        "bags.png",
        "confusion.png",
        "per_class.csv",
        "per_label.csv",
        "per_value.csv",
        "values.png",
        "receptive_field.png",
        "samples.gif",
        "samples.png",
        "images.png",
        "pipeline",
        "metrics.csv",
        UNREADABLE,
        "checkpoints/last.ckpt",
        "config.yaml",
    )
    say(numbers, lead=split)
    for name in names:
        if (run_dir / name).exists():
            console().print(str(shown / name))
    bags = f"{split}/auroc" in metrics  # no command classifies those
    for line in [] if bags else _next_steps(run_dir, shlex.quote(str(shown))):
        say(line, lead="next")
