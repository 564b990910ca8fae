"""Between a configuration and a run: which classes it may name, where the run lives, what its trainer is made of."""

from __future__ import annotations

import inspect
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from lightning.pytorch.callbacks import Callback, Checkpoint, LearningRateMonitor, ModelSummary, ProgressBar
from omegaconf import DictConfig, OmegaConf

from ..data.foreign import reason
from ..data.names import unknown_name
from .checkpoint import newest_checkpoint, read_checkpoint
from .display import Bar, Summary
from .record import is_unfinished
from .sharding import FullyShardedStrategy

ALLOWED = ("foveal.", "torch.optim.", "lightning.pytorch.")
# dicts of arguments for functions that check them: a dict given for one of these adds to it
PASSED_ON = r"model\.args|task\.(optimizer|scheduler|mixup)|data\.(train_transform|eval_transform|options)"


def open_dicts(arguments: list[str]) -> list[str]:
    """Command-line arguments in which `model.args={…}` may name arguments that the configuration does not have yet,
    also where an experiment sets some: Hydra merges dicts, and a closed one takes no new keys without `++`."""
    return [f"++{item}" if re.match(rf"({PASSED_ON})=.*\{{", item) else item for item in arguments]


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


@dataclass(frozen=True)
class Start:
    """Beginning of a run: fresh, resumed, or evaluation only.

    Args:
        run_dir: where everything goes.
        checkpoint: what it goes on from, or evaluates; None: a new run.
        evaluates: the checkpoint's run has ended, and stays as it is.
    """

    run_dir: Path
    checkpoint: Path | None = None
    evaluates: bool = False

    @property
    def in_words(self) -> str:
        if self.checkpoint is None:
            return "starts"
        return (
            f"evaluates {self.checkpoint}, whose run has ended" if self.evaluates else f"goes on from {self.checkpoint}"
        )


def is_trained(checkpoint: Mapping[str, Any], config: DictConfig) -> bool:
    """Return whether nothing is left to train.

    The checkpoint has the epochs or steps of the configuration behind it, or early stopping has lost its patience.
    """
    epochs, steps = config.trainer.get("max_epochs"), config.trainer.get("max_steps", -1)
    done = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if (epochs not in (None, -1) and done >= epochs) or (steps != -1 and checkpoint["global_step"] >= steps):
        return True
    waited = [state["wait_count"] for key, state in checkpoint["callbacks"].items() if key.startswith("EarlyStopping")]
    stopping = [
        callback for callback in (config.get("callbacks") or {}).values() if callback and "patience" in callback
    ]
    return any(0 < count >= callback.patience for count, callback in zip(waited, stopping, strict=False))


def find_start(config: DictConfig) -> Start:
    """The run's folder and the checkpoint it goes on from, as `resolve_run` finds them.

    A run that was trained and measured to its end has nothing to go on with: its checkpoint is evaluated, and the
    results go to a folder of their own.

    Raises:
        FileNotFoundError, ValueError: `ckpt_path` is not there, damaged or of another program; the folder cannot be
            written.
    """
    run_dir, checkpoint = resolve_run(config)
    evaluates = False
    if checkpoint is not None:
        trained = is_trained(read_checkpoint(checkpoint), config)
        evaluates = trained and checkpoint.parent.parent == run_dir and not is_unfinished(run_dir)
    if evaluates:
        run_dir = (Path(config.runs) / config.name / time.strftime("evaluation_%Y-%m-%d_%H-%M-%S")).resolve()
    check_writable(run_dir)
    return Start(run_dir, checkpoint, evaluates)


def check_writable(run_dir: Path) -> None:
    """Raises ValueError when a run's folder cannot be made or written, before anything is trained."""
    try:
        there = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
        with TemporaryDirectory(prefix=".foveal-", dir=there):  # the root user may write where no folder can be
            pass
    except OSError as error:
        raise ValueError(f"run_dir={str(run_dir)!r} cannot be written: {reason(error)}") from error


def check_metrics(config: DictConfig, task: Any) -> None:
    """Checks that what is compared, kept and waited for will be measured.

    Args:
        config: of the run: `metric`, and `monitor` of its callbacks.
        task: with the names that it logs as `measured`; without, nothing is checked.

    Raises:
        ValueError: names the key.
    """
    measured = getattr(task, "measured", None)
    if measured is None:
        return
    no_validation = config.trainer.get("limit_val_batches") == 0
    known = [name for name in measured if not (no_validation and name.startswith("val/"))]
    if config.metric.startswith("test/"):  # reports measure more than the task
        if not config.test:
            raise ValueError(f"metric={config.metric!r} is not measured with test=false")
    elif config.metric not in known:
        raise unknown_name("metric", config.metric, known)
    for name, callback in (config.get("callbacks") or {}).items():
        monitor = callback.get("monitor") if callback else None
        if monitor is not None and monitor not in (*measured, "epoch", "step"):
            raise unknown_name(f"callbacks.{name}.monitor", monitor, measured)


def instantiate_all(group: dict[str, Any] | None) -> list[Any]:
    """The objects of a group; one that was set to null is left out, also when an experiment still sets its options."""
    return [instantiate(node, _convert_="all") for node in (group or {}).values() if node and "_target_" in node]


def make_callbacks(options: dict[str, Any] | None, trainer: dict[str, Any], *, logs: bool) -> list[Callback]:
    """The callbacks of a configuration, less those that the trainer's switches turn off, and the bar and the summary
    that its switches turn on.

    Args:
        options: the group `callbacks`; `progress: null` turns the progress bar off as well.
        trainer: the trainer's options; its switches are set to what the callbacks are.
        logs: whether there is a logger.
    """
    callbacks = instantiate_all(options)
    off: list[type] = [] if logs else [LearningRateMonitor]
    if not trainer.get("enable_checkpointing", True):
        off.append(Checkpoint)
    if not trainer.get("enable_progress_bar", True):
        off.append(ProgressBar)
    if not trainer.get("enable_model_summary", True):
        off.append(ModelSummary)
    callbacks = [callback for callback in callbacks if not isinstance(callback, tuple(off))]
    barred = ProgressBar in off or (options is not None and "progress" in options and options["progress"] is None)
    if not barred and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        callbacks.append(Bar())
    if ModelSummary not in off and not any(isinstance(callback, ModelSummary) for callback in callbacks):
        callbacks.append(Summary())
    trainer["enable_progress_bar"] = not barred
    return callbacks


def make_strategy(strategy: Any) -> Any:
    """Strategy for `Trainer`: "fsdp" is our single-file FSDP2, a `_target_` is built, other names pass.

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
