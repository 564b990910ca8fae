"""Stopping a run from outside, by SIGTERM or Ctrl-C, so that it can go on where it was."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from .console import tell

STATUS = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 128 + signal.SIGINT}  # as shells have it
START_KEYS = ("run_dir=", "ckpt_path=")


class Interruption(Checkpoint):
    """Writes `last.ckpt` when SIGTERM stops training, so that the resumed run makes the steps that were left.

    Lightning stops after the batch in which the signal came, or inside of validation. There the weights may be the
    average's and counters are half-way, so the state at the end of the last training batch is kept aside, by
    reference, until training goes on. Ctrl-C stops in the same way; pressed twice, at once.

    Of sharded weights, and on several devices at the end of an epoch, nothing is written: ranks may be at different
    batches, and the state is gathered from all.

    Args:
        path: of `last.ckpt`.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.signal = path, signal.SIGTERM
        self._held: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            for left in self.path.parent.glob("*.ckpt.partial"):  # by a process that was killed
                left.unlink()
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._stop_after_this_batch)  # Lightning restores what was there

    def _stop_after_this_batch(self, signum: int, frame: FrameType | None) -> None:
        self.signal = signal.SIGINT
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tell("stopping after this batch; press Ctrl-C again to stop at once, without a checkpoint")
        os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._held = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        between = trainer.val_check_batch
        validates = isinstance(between, int) and (batch_idx + 1) % between == 0
        if trainer.is_last_batch or validates:
            self._hold(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hold(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._held = None  # the model takes the averaged weights after this

    def _hold(self, trainer: Trainer) -> None:
        if trainer.world_size == 1 and not trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            self._held = _state(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        sharded = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
        if not isinstance(exception, SIGTERMException) or sharded or trainer.fast_dev_run:  # pyright: ignore
            return
        inside = trainer.training and not trainer.is_last_batch  # of an epoch, between two batches
        if self._held is None and inside:
            self._held = _state(trainer)
        if self._held is not None:  # ranks do not wait for each other: they may be at different batches
            trainer.strategy.save_checkpoint(self._held, self.path)


def _state(trainer: Trainer) -> dict[str, Any]:
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def status_of(stopped: BaseException, trainer: Trainer) -> int | None:
    """Exit status when SIGTERM or Ctrl-C was what ended training, else None. A scheduler may send SIGTERM to workers
    of the loader as well, and their end may be noticed first."""
    workers = isinstance(stopped, RuntimeError) and "DataLoader worker" in str(stopped) and trainer.received_sigterm
    if isinstance(stopped, SIGTERMException) or workers:
        by = next((c.signal for c in trainer.callbacks if isinstance(c, Interruption)), signal.SIGTERM)  # pyright: ignore
        return STATUS[by]
    return STATUS[signal.SIGINT] if isinstance(stopped.__context__, KeyboardInterrupt) else None


def how_to_go_on(run_dir: Path) -> str:
    """The command that goes on with a run in its folder: that of this process, or of this job of a sweep."""
    job = HydraConfig.get() if HydraConfig.initialized() else None
    given = sys.argv[1:] if job is None or job.mode != RunMode.MULTIRUN else job.overrides.task
    arguments = [item for item in given if not item.startswith(START_KEYS)]
    script = Path(sys.argv[0])
    outside = script.name == "train.py" and not script.is_absolute()  # of `python train.py`
    return shlex.join(
        [
            *(["python", str(script)] if outside else ["foveal-train"]),
            *arguments,
            f"run_dir={run_dir}",
            "ckpt_path=auto",
        ]
    )


def report_stop(status: int, run_dir: Path, *, step: int) -> None:
    """Says on stderr what stopped the run and how to go on."""
    by = next(signum.name for signum, code in STATUS.items() if code == status)
    saved = (run_dir / "checkpoints" / "last.ckpt").is_file()
    hint = f"to go on: {how_to_go_on(run_dir)}" if saved else "it has no checkpoint yet"
    tell(f"{by} stopped {run_dir} at step {step}; {hint}")


def stop_between_stages(trainer: Trainer) -> None:
    """Raises SIGTERMException when SIGTERM came after the last batch of a stage, where Lightning does not look."""
    if trainer.received_sigterm:
        raise SIGTERMException
