"""Two processes on CPU (gloo): the gradients of one, and checkpoints that one process and many can exchange."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foveal import train
from foveal.weights import load
from train_helpers import QUIET, TINY_VIT, configure

ROOT = Path(__file__).resolve().parents[2]
# plain SGD: the steps are the gradients; no dropout, whose draws differ from rank to rank
PLAIN = (
    "model.args.drop_path_rate=0.0",
    "model.args.proj_drop_rate=0.0",
    "++task.optimizer.momentum=0.9",
    "task.optimizer.opt=momentum",
    "task.optimizer.lr=1.0",
    "task.scheduler=null",
    "callbacks.ema=null",
    "callbacks.best=null",
    "callbacks.report=null",
    "logger=none",
    "trainer.gradient_clip_val=null",
    "trainer.limit_val_batches=0",
    "trainer.max_epochs=1",
    "metric=train/loss",
)


def fit(config, checkpoint=None):
    trainer, task, data = train.build(config)
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return trainer, task


def initial_weights(config) -> dict[str, torch.Tensor]:
    _, task, _ = train.build(config)
    return {name: value.clone() for name, value in task.state_dict().items()}


@pytest.mark.slow
def test_two_processes_make_the_gradients_of_one(tmp_path):
    step = (*PLAIN, "trainer.limit_train_batches=1")
    start = initial_weights(configure(tmp_path, *step))
    _, one = fit(configure(tmp_path / "one", *step, "data.batch_size=16"))
    spawn = ("trainer.strategy=ddp_spawn", "trainer.devices=2", "data.batch_size=8")
    trainer, two = fit(configure(tmp_path / "two", *step, *spawn))
    assert trainer.world_size == 2
    gradients = [{name: start[name] - value for name, value in task.state_dict().items()} for task in (one, two)]
    assert max(float(gradient.abs().max()) for gradient in gradients[0].values()) > 0.01
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6, msg=name)


def run_sharded(run_dir: Path, *overrides: str, precision: tuple[str, ...] = ("trainer.precision=32-true",)) -> None:
    sharded = ("trainer=fsdp", "trainer.devices=2", *precision, "data.batch_size=8", "test=false")
    arguments = [*QUIET, *TINY_VIT, *PLAIN, *sharded, *overrides, f"run_dir={run_dir}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, cwd=run_dir.parent, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same_state(ours: dict, theirs: dict) -> None:
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=1e-5)
    (ours,), (theirs,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert [group["params"] for group in ours["param_groups"]] == [group["params"] for group in theirs["param_groups"]]
    assert [group["lr"] for group in ours["param_groups"]] == [group["lr"] for group in theirs["param_groups"]]
    assert len(theirs["state"]) > 10
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=1e-5)


def last(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
def test_sharded_run_saves_what_one_process_saves_and_loads(tmp_path):
    """Two sharded processes train an epoch; one process makes the same checkpoint, and goes on from either alike."""
    epoch = (*PLAIN, "task.optimizer.lr=0.05", "trainer.limit_train_batches=2")
    run_sharded(tmp_path / "sharded", *epoch)
    fit(configure(tmp_path / "one", *epoch, "data.batch_size=16"))
    assert_same_state(last(tmp_path / "sharded"), last(tmp_path / "one"))
    ours, theirs = (load(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("sharded", "one"))
    assert "head.weight" in ours
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for run in ("sharded", "one"):
        more = (*epoch, "data.batch_size=16", "trainer.max_epochs=2")
        fit(configure(tmp_path / run, *more), tmp_path / run / "checkpoints" / "last.ckpt")
        assert last(tmp_path / run)["global_step"] == 4
    assert_same_state(last(tmp_path / "sharded"), last(tmp_path / "one"))


@pytest.mark.slow
def test_sharded_weights_are_float32_and_small_steps_move_them(tmp_path):
    """With the precision that trainer=fsdp ships: steps of 1e-5 are less than bfloat16 can add to most weights."""
    adam = ("task.optimizer.opt=adamw", "~task.optimizer.momentum", "task.optimizer.lr=1e-5")
    epoch = (*PLAIN, "trainer.limit_train_batches=2", "task.optimizer.weight_decay=0.0")
    run_sharded(tmp_path / "none", *epoch, *adam[:2], "task.optimizer.lr=0.0", precision=())
    run_sharded(tmp_path / "two", *epoch, *adam, precision=())
    start, moved = (last(tmp_path / run)["state_dict"] for run in ("none", "two"))
    weights = [name for name, value in start.items() if name.startswith("model.") and value.ndim >= 2]
    assert {moved[name].dtype for name in weights} == {torch.float32} and len(weights) > 5
    for name in weights:
        assert (moved[name] != start[name]).float().mean() > 0.9, name
        assert (moved[name] - start[name]).abs().max() < 1e-4, name
    fit(
        configure(tmp_path / "two", *epoch, *adam, "data.batch_size=16", "trainer.max_epochs=2"),
        tmp_path / "two" / "checkpoints" / "last.ckpt",
    )
    assert last(tmp_path / "two")["global_step"] == 4


@pytest.mark.slow
def test_sharded_run_goes_on_from_what_one_process_saved(tmp_path):
    epoch = (*PLAIN, "task.optimizer.lr=0.05", "trainer.limit_train_batches=2")
    for run in ("sharded", "one"):
        fit(configure(tmp_path / run, *epoch, "data.batch_size=16"))
    checkpoint = tmp_path / "sharded" / "checkpoints" / "last.ckpt"
    run_sharded(tmp_path / "sharded", *epoch, "trainer.max_epochs=2", f"ckpt_path={checkpoint}")
    more = configure(tmp_path / "one", *epoch, "data.batch_size=16", "trainer.max_epochs=2")
    fit(more, tmp_path / "one" / "checkpoints" / "last.ckpt")
    assert last(tmp_path / "sharded")["global_step"] == 4
    assert_same_state(last(tmp_path / "sharded"), last(tmp_path / "one"))


def test_average_is_refused_with_sharded_weights(tmp_path):
    config = configure(tmp_path, "trainer.strategy=fsdp")
    trainer, task, _ = train.build(config)
    with pytest.raises(ValueError, match=r"pass callbacks\.ema=null"):
        next(callback for callback in trainer.callbacks if type(callback).__name__ == "EMA").setup(trainer, task, "fit")


@pytest.mark.slow
def test_strategies_that_start_the_script_again_are_refused_in_a_sweep(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = ["-m", "seed=0,1", "trainer.strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    failed = "foveal-train: job 1 (seed=1) of the sweep failed: trainer.strategy='ddp' cannot start its processes"
    assert failed in done.stderr
    assert "Traceback" not in done.stderr
