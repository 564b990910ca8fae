"""Between a configuration and a run: which classes it may name, where the run lives, and what is written beside it."""

from __future__ import annotations

import inspect
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from .checkpoint import newest_checkpoint
from .report import UNREADABLE, read_unreadable
from .sharding import FullyShardedStrategy

ALLOWED = ("foveal.", "torch.optim.", "lightning.pytorch.")
PACKAGES = ("foveal", "torch", "torchvision", "triton", "timm", "lightning", "torchmetrics", "hydra-core", "numpy")


def _targets(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in children:
        path = f"{key}.{name}" if key else str(name)
        if name == "_target_":
            yield path, value
        yield from _targets(value, path)


def check_targets(config: DictConfig) -> None:
    """Refuses a configuration that would call anything but classes of foveal, torch.optim and lightning.pytorch.

    The class itself must be defined there: a path that only passes through an allowed module to something that module
    imported (`lightning.pytorch.trainer.trainer.os.system`) is refused as well.

    Raises:
        ValueError: names the key and the target.
    """
    for key, target in _targets(OmegaConf.to_container(config, resolve=True)):
        accepted = f"accepted are classes under {', '.join(ALLOWED)}"
        if not isinstance(target, str) or not target.startswith(ALLOWED):
            raise ValueError(f"{key}={target!r} is not allowed: {accepted}")
        try:
            found = get_object(target)
        except (HydraException, ImportError, ValueError) as error:
            raise ValueError(f"{key}={target!r} does not exist: {accepted}") from error
        if not inspect.isclass(found) or not f"{found.__module__}.".startswith(ALLOWED):
            raise ValueError(f"{key}={target!r} is not a class of these packages: {accepted}")


def resolve_run(config: DictConfig) -> tuple[Path, Path | None]:
    """The run's folder and the checkpoint it goes on from, if any, as `run_dir`, `ckpt_path`, `runs` and `name` say.

    Only the main process of a run makes its folder, so ranks that see another second on the clock do no harm.

    Raises:
        FileNotFoundError: `ckpt_path` is not there.
    """
    experiment = Path(config.runs) / config.name
    checkpoint = None
    if config.ckpt_path == "auto" and config.run_dir:
        own = Path(config.run_dir) / "checkpoints" / "last.ckpt"
        checkpoint = own if own.is_file() else None
    elif config.ckpt_path == "auto":
        checkpoint = newest_checkpoint(experiment)
    elif config.ckpt_path is not None:
        checkpoint = Path(config.ckpt_path)
        if not checkpoint.exists():
            raise FileNotFoundError(f"ckpt_path={config.ckpt_path!r} does not exist")
    if checkpoint is not None:
        checkpoint = checkpoint.resolve()
    if config.run_dir:
        return Path(config.run_dir).resolve(), checkpoint
    if checkpoint is not None and checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent, checkpoint
    return (experiment / time.strftime("%Y-%m-%d_%H-%M-%S")).resolve(), checkpoint


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
    """What a run ran on: command, commit, versions, hardware."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__  # says which CUDA or ROCm it is for
    return {
        "command": " ".join(sys.argv),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
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


@rank_zero_only
def write_record(config: DictConfig, run_dir: Path, checkpoint: Path | None) -> None:
    """Writes `config.yaml` (resolved) and `environment.json`, a list that a resumed run adds to; says what starts."""
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    path = run_dir / "environment.json"
    starts = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*starts, environment()], indent=2) + "\n")
    going_on = f"goes on from {checkpoint}" if checkpoint else "starts"
    Console().print(f"[bold]{config.name}[/] {going_on}; everything goes to {run_dir}", highlight=False, soft_wrap=True)


def instantiate_all(group: dict[str, Any] | None) -> list[Any]:
    """The objects of a group; one that was set to null is left out, also when an experiment still sets its options."""
    return [instantiate(node, _convert_="all") for node in (group or {}).values() if node and "_target_" in node]


def make_strategy(strategy: Any) -> Any:
    """What `Trainer` takes as strategy: "fsdp" is our single-file FSDP2, a `_target_` is built, other names pass.

    Raises:
        ValueError: a strategy that starts this script again, inside a sweep: it would start the whole sweep again.
    """
    starts_script = strategy in ("ddp", "ddp_find_unused_parameters_true", "fsdp")
    sweeping = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if starts_script and sweeping and "LOCAL_RANK" not in os.environ:
        raise ValueError(
            f"trainer.strategy={strategy!r} cannot start its processes inside a sweep: pass "
            "trainer.strategy=ddp_spawn, or run the jobs of the sweep one by one"
        )
    if strategy == "fsdp":
        return FullyShardedStrategy()
    return strategy if isinstance(strategy, str) else instantiate(strategy)


@rank_zero_only
def print_summary(metrics: dict[str, float], run_dir: Path) -> None:
    """Prints the numbers of the test (or of validation) and where the pictures are."""
    split = next((split for split in ("test", "val", "train") if f"{split}/loss" in metrics), "train")
    units = {
        "acc1": ("accuracy", 100, ".2f", " %"),
        "acc5": ("top-5", 100, ".2f", " %"),
        "accuracy": ("accuracy of samples", 100, ".0f", " %"),
        "frechet": ("Fréchet distance", 1, ".1f", ""),
        "loss": ("loss", 1, ".4f", ""),
    }
    lines = [f"[bold]{split}[/]"]
    for name, (label, scale, digits, unit) in units.items():
        if f"{split}/{name}" in metrics:
            lines[0] += f"  {label} {scale * metrics[f'{split}/{name}']:{digits}}{unit}"
    unreadable = sum(row["split"] == split for row in read_unreadable(run_dir))
    if unreadable:
        lines[0] += f"  ({unreadable} images could not be read and do not count)"
    shown = run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
    names = (
        "curves.png",
        "predictions.png",
        "receptive_field.png",
        "samples.gif",
        "samples.png",
        "pipeline",
        "metrics.csv",
        UNREADABLE,
        "checkpoints/last.ckpt",
        "config.yaml",
    )
    lines += [f"{shown / name}" for name in names if (run_dir / name).exists()]
    Console().print("\n".join(lines), highlight=False, soft_wrap=True)
