"""Going on from a checkpoint: what has to fit is checked first, and what the configuration changes is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.optim import Optimizer

from .optim import make_optimizer, seek

OF_A_START = ("run_dir", "ckpt_path", "runs", "test")  # keys that may differ from start to start of one run


def flat(node: Any, key: str = "") -> dict[str, Any]:
    """The values of a nested configuration by their dotted keys; lists are values."""
    if not isinstance(node, Mapping) or not node:
        return {key: node}
    items = {}
    for name, value in node.items():
        items |= flat(value, f"{key}.{name}" if key else str(name))
    return items


def differing(old: Any, new: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Values `(old, new)` that differ between two configurations, by their dotted keys; None where there is none."""
    ours, theirs = flat(new, key), flat(old, key)
    return {
        name: (theirs.get(name), ours.get(name))
        for name in dict.fromkeys((*theirs, *ours))
        if theirs.get(name) != ours.get(name)
    }


def listed(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Differences as text: `task.optimizer.lr 0.002 → 0.009`."""
    return ", ".join(f"{key} {old!r} → {new!r}" for key, (old, new) in changes.items())


def check_weights(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, path: Path, because: str = "") -> None:
    """Raises ValueError, with the first difference, when weights of a checkpoint have other names or shapes than the
    model's; `because` says what else differs."""
    shapes = [{name: list(value.shape) for name, value in state.items()} for state in (ours, theirs)]
    wrong = [name for name in dict.fromkeys((*shapes[0], *shapes[1])) if shapes[0].get(name) != shapes[1].get(name)]
    if wrong:
        here, there = (f"{state[wrong[0]]}" if wrong[0] in state else "missing" for state in shapes)
        raise ValueError(
            f"ckpt_path={str(path)!r} does not fit the model: {len(wrong)} of {len(shapes[0])} weights differ, first "
            f"{wrong[0]}, {there} in the checkpoint and {here} in the model{because}"
        )


def check_groups(optimizer: Optimizer, saved: Mapping[str, Any], *, path: Path, changes: Mapping[str, Any]) -> None:
    """Raises ValueError when the optimizer of a checkpoint has its parameters in other groups; `changes` are those of
    the optimizer's options."""
    groups, theirs = (
        [len(group["params"]) for group in each] for each in (optimizer.param_groups, saved["param_groups"])
    )
    if groups != theirs:
        because = listed(changes or {"parameters by group": (theirs, groups)})
        raise ValueError(
            f"task.optimizer cannot go on from {path}, whose parameters are in other groups: {because}; pass what the "
            "checkpoint was made with, or begin a new run"
        )


def check_resume(task: Any, checkpoint: Mapping[str, Any], *, path: Path) -> None:
    """Checks, before anything is trained or written, that a task can go on from a checkpoint.

    Args:
        task: a task with its `model`, or None in its place when it is built later, on its devices.
        checkpoint: as Lightning wrote it.
        path: where it is from.

    Raises:
        ValueError: another optimizer, other groups of parameters or other weights; names the keys that differ.
    """
    old: dict[str, Any] = dict(checkpoint.get("hyper_parameters", {}))
    theirs, ours = old.get("optimizer", {}), task.optimizer_cfg
    if theirs.get("opt", ours["opt"]) != ours["opt"]:
        raise ValueError(
            f"task.optimizer.opt={ours['opt']!r} cannot go on from {path}, which was made with {theirs['opt']!r}: pass "
            f"task.optimizer.opt={theirs['opt']}, or begin a new run"
        )
    if task.model is None:
        return
    of_model = {key: value for key, value in task.hparams.items() if key in ("model", "num_classes", "in_chans")}
    changes = differing({key: old.get(key) for key in of_model}, of_model) if old else {}
    changes.pop("model.pretrained", None)
    because = f": {listed(changes)}" if changes else ""
    check_weights(task.state_dict(), checkpoint["state_dict"], path=path, because=because)
    changes = differing(theirs, dict(ours), "task.optimizer")
    check_groups(make_optimizer(task.model, ours), checkpoint["optimizer_states"][0], path=path, changes=changes)


def changed_since(config: DictConfig, checkpoint: Mapping[str, Any], *, path: Path) -> dict[str, tuple[Any, Any]]:
    """Values that differ from the last start of the checkpoint's run, `(old, new)` by key.

    The old ones come from the run's `config.yaml` or, where that is gone, from the task's part in the checkpoint.
    """
    record = path.parent.parent / "config.yaml"
    if not record.is_file():
        saved = checkpoint.get("hyper_parameters", {})
        task: Any = OmegaConf.to_container(config.task, resolve=True)
        return differing({"task": saved}, {"task": {key: task.get(key) for key in saved if key in task}})
    old: Any = OmegaConf.to_container(OmegaConf.load(record))
    here = config.copy()
    here.run_dir = old.get("run_dir")  # the folder is part of many values
    changes = differing(old, OmegaConf.to_container(here, resolve=True))
    written = flat(OmegaConf.to_container(config, resolve=False))
    follow = {key for key, value in written.items() if isinstance(value, str) and "${" in value}  # another key
    return {key: values for key, values in changes.items() if not _is_within(key, {*OF_A_START, *follow})}


def _is_within(key: str, keys: set[str]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[: end + 1]) in keys for end in range(len(parts)))


def validate_first(loop: dict[str, Any]) -> bool:
    """Makes a checkpoint from the last batch of an epoch go on with the validation of that epoch; returns whether it
    was such a one.

    Lightning takes its epoch for finished, validation and metrics included, though none of it was done. The counters
    become those of a run that was stopped in the first batch of validation.

    Args:
        loop: state of the trainer's `fit_loop` in the checkpoint; it is changed.
    """
    batches, validation = loop["epoch_loop.batch_progress"], loop["epoch_loop.val_loop.batch_progress"]
    if not batches["is_last_batch"] or batches["total"]["completed"] != batches["total"]["processed"] - 1:
        return False
    for counts in (batches["total"], batches["current"]):
        counts["completed"] += 1
    validation["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    validation["total"] |= {key: validation["total"]["completed"] + 1 for key in ("ready", "started")}
    validation["is_last_batch"] = False
    return True


class Resumption(Callback):
    """Makes a resumed run train as its configuration says where it differs from the checkpoint's.

    Lightning restores the optimizer's learning rate, weight decay and the like, the schedule and the patience of early
    stopping from the checkpoint, so that new values would be in the record and not in the run. Schedules are functions
    of the step: they are made from the configuration and set to the step of the checkpoint. Values of the optimizer
    are those of the configuration where it changed; others may be counters of the optimizer's own.
    """

    def __init__(self):
        self._old: dict[str, Any] | None = None  # hyper-parameters of the checkpoint
        self._fresh: list[list[dict[str, Any]]] = []
        self._patience: list[int] = []
        self._validates_first = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._old = None
        self._patience = [callback.patience for callback in _early_stopping(trainer)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizers are as the configuration makes them: they are restored after this, callbacks were before."""
        self._fresh = [[_options(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        for callback, patience in zip(_early_stopping(trainer), self._patience, strict=True):
            callback.patience = patience
            trainer.should_stop |= 0 < callback.wait_count >= patience  # it had stopped

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._old = dict(checkpoint.get("hyper_parameters", {}))
            checkpoint["lr_schedulers"] = []
            self._validates_first = validate_first(checkpoint["loops"]["fit_loop"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_restart(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_restart(trainer)

    def _end_restart(self, trainer: Trainer) -> None:
        """Validation counts from its beginning, and no checkpoint after this one says that it was interrupted."""
        if self._validates_first:
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()
            self._validates_first = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._old is None:
            return
        for optimizer, fresh in zip(trainer.optimizers, self._fresh, strict=True):
            made = self._as_made(pl_module) or fresh
            for group, new, old in zip(optimizer.param_groups, fresh, made, strict=True):
                group |= {key: value for key, value in new.items() if key == "lr" or value != old.get(key)}
        for schedule in trainer.lr_scheduler_configs:
            seek(schedule.scheduler, trainer.global_step)

    def _as_made(self, task: Any) -> list[dict[str, Any]] | None:
        """The groups of the checkpoint's optimizer as they were made, by the options in the checkpoint."""
        options = (self._old or {}).get("optimizer")
        if options is None or options == task.optimizer_cfg:
            return None
        return [_options(group) for group in make_optimizer(task.model, options).param_groups]


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _early_stopping(trainer: Trainer) -> list[EarlyStopping]:
    return [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # pyright: ignore
