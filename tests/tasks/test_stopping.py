"""Runs stopped from outside, at any moment, end like uninterrupted ones when they go on, and say how to."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from foveal import train
from foveal.zoo.tasks.stopping import how_to_go_on, status_of
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from train_helpers import configure, differences

SHORT = (
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=3",
    "trainer.limit_val_batches=2",
    "data.batch_size=16",
    "logger=none",
    "callbacks.ema.decay=0.5",
    "test=false",
)


class SignalAt(Callback):
    """Sends a signal to this process, once, in a hook."""

    def __init__(self, hook: str, count: int, signum: signal.Signals = signal.SIGTERM):
        self.left, self.signum = count, signum
        setattr(self, hook, self._hook)

    def _hook(self, *args, **kwargs) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), self.signum)


def fit(config, *callbacks: Callback, checkpoint: Path | None = None):
    trainer, task, data = train.build(config)
    trainer.callbacks = [*callbacks, *trainer.callbacks]
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stopped:
        return status_of(stopped, trainer), trainer.global_step
    return None, trainer.global_step


def end_of(run: Path) -> tuple[dict, str]:
    """The last checkpoint but for paths, and the table of metrics."""
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    state["callbacks"] = {key: value for key, value in state["callbacks"].items() if "ModelCheckpoint" not in key}
    return state, (run / "metrics.csv").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole")
    assert fit(configure(run, *SHORT)) == (None, 6)
    return run


@pytest.mark.parametrize(
    ("hook", "count", "step"),
    [
        ("on_train_batch_start", 2, 2),
        ("on_train_batch_end", 3, 3),
        ("on_validation_batch_end", 1, 3),
        ("on_train_epoch_end", 1, 3),
        ("on_validation_batch_start", 3, 6),
    ],
)
def test_a_terminated_run_ends_like_an_uninterrupted_one(whole, tmp_path, hook, count, step):
    """Inside an epoch, on its last batch, inside of validation, after it, in the last validation."""
    assert fit(configure(tmp_path, *SHORT), SignalAt(hook, count)) == (143, step)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == step
    assert fit(configure(tmp_path, *SHORT), checkpoint=last) == (None, 6)
    (ours, table), (theirs, expected) = end_of(tmp_path), end_of(whole)
    assert differences(ours, theirs) == []
    assert table == expected


def test_ctrl_c_stops_after_the_batch_and_twice_at_once(whole, tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    assert fit(configure(tmp_path / "once", *SHORT), SignalAt("on_train_batch_start", 2, signal.SIGINT)) == (130, 2)
    assert "press Ctrl-C again" in capsys.readouterr().err
    last = tmp_path / "once" / "checkpoints" / "last.ckpt"
    assert fit(configure(tmp_path / "once", *SHORT), checkpoint=last) == (None, 6)
    assert differences(end_of(tmp_path / "once")[0], end_of(whole)[0]) == []
    twice = [SignalAt("on_train_batch_start", 2, signal.SIGINT) for _ in range(2)]
    assert fit(configure(tmp_path / "twice", *SHORT), *twice) == (130, 1)
    assert not (tmp_path / "twice" / "checkpoints").exists()
    assert signal.getsignal(signal.SIGINT) in (before, signal.SIG_IGN)  # Lightning's after the second
    signal.signal(signal.SIGINT, before)


def test_the_command_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    """And the record that the run has not ended, until it is gone on with to its end."""
    monkeypatch.setattr(sys, "argv", ["foveal-train", "name=a b", "run_dir=x", "ckpt_path=auto"])
    run = tmp_path / "my run"
    assert how_to_go_on(run) == f"foveal-train 'name=a b' 'run_dir={run}' ckpt_path=auto"
    config = configure(run, *SHORT, "trainer.limit_test_batches=2", "test=true")
    stop_in_test = SignalAt("on_test_start", 1)
    build = train.build
    with monkeypatch.context() as patch:
        patch.setattr(train, "build", lambda config: _with(build(config), stop_in_test))
        with pytest.raises(SystemExit) as stopped:
            train.train(config.copy())
    assert stopped.value.code == 143
    assert f"SIGTERM stopped {run} at step 6; to go on: foveal-train" in capsys.readouterr().err.replace("\n", " ")
    assert '"ended": null' in (run / "environment.json").read_text()
    config.ckpt_path = "auto"
    train.train(config)
    assert "goes on from" in capsys.readouterr().out
    assert (run / "predictions.png").is_file()
    assert (run / "environment.json").read_text().count('"test/acc1"') == 1


def _with(built, callback: Callback):
    built[0].callbacks.insert(0, callback)
    return built


def test_left_over_halves_of_checkpoints_are_removed(tmp_path):
    half = tmp_path / "checkpoints" / "best-001.ckpt.partial"
    half.parent.mkdir()
    half.write_bytes(b"half")
    fit(configure(tmp_path, *SHORT, "trainer.max_epochs=1", "trainer.limit_train_batches=1"))
    assert not half.exists() and (half.parent / "last.ckpt").is_file()


def test_a_worker_that_the_scheduler_ended_first_is_no_failure():
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")
    trainer = type("Stopped", (), {"received_sigterm": True, "callbacks": []})()
    assert status_of(error, trainer) == status_of(SIGTERMException(), trainer) == 143
    trainer.received_sigterm = False
    assert status_of(error, trainer) is None and status_of(SystemExit(3), trainer) is None
    assert threading.current_thread() is threading.main_thread()
