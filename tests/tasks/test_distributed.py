"""Two processes on CPU (gloo): the gradients of one, and checkpoints that one process and many can exchange."""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from foveal import train
from foveal.weights import load
from foveal.zoo.tasks.ema import EMA, ema_update
from foveal.zoo.tasks.sharded_average import ShardedAverage, local_state
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel
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


def run_sharded(
    run_dir: Path,
    *overrides: str,
    precision: tuple[str, ...] = ("trainer.precision=32-true",),
    plain: tuple[str, ...] = PLAIN,
) -> None:
    sharded = ("trainer=fsdp", "trainer.devices=2", *precision, "data.batch_size=8", "test=false")
    arguments = [*QUIET, *TINY_VIT, *plain, *sharded, *overrides, f"run_dir={run_dir}"]
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


# validation comes after every epoch, looks at the average and gives the weights back
AVERAGED = (
    *(option for option in PLAIN if option != "callbacks.ema=null"),
    "callbacks.ema.decay=0.8",
    "task.optimizer.lr=0.05",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.max_epochs=2",
)


def assert_same_average(ours: dict, theirs: dict, *, updates: int) -> None:
    assert_same_state(ours, theirs)
    raw = ours["current_model_state"]
    torch.testing.assert_close(raw, theirs["current_model_state"], rtol=0, atol=1e-5)
    for state in (ours, theirs):
        assert int(state["averaging_state"]["n_averaged"]) == updates
    assert max((raw[name] - value).abs().max() for name, value in ours["state_dict"].items()) > 1e-3


@pytest.mark.slow
def test_sharded_average_is_that_of_one_process(tmp_path):
    """Two epochs of two processes and of one, then a third epoch: both go on from either checkpoint."""
    more = (*AVERAGED, "trainer.max_epochs=3")
    run_sharded(tmp_path / "sharded", plain=AVERAGED)
    fit(configure(tmp_path / "one", *AVERAGED, "data.batch_size=16"))
    assert_same_average(last(tmp_path / "sharded"), last(tmp_path / "one"), updates=4)
    torch.testing.assert_close(
        load(tmp_path / "sharded" / "checkpoints" / "last.ckpt"),
        {name.removeprefix("model."): value for name, value in last(tmp_path / "one")["state_dict"].items()},
        rtol=0,
        atol=1e-5,
    )
    checkpoints = {run: tmp_path / run / "checkpoints" / "last.ckpt" for run in ("sharded", "one")}
    fit(configure(tmp_path / "on", *more, "data.batch_size=16"), checkpoints["sharded"])
    run_sharded(tmp_path / "one", f"ckpt_path={checkpoints['one']}", plain=more)
    assert_same_average(last(tmp_path / "one"), last(tmp_path / "on"), updates=6)


@pytest.mark.parametrize("split", [False, True])
def test_average_of_shards_is_that_of_the_whole(split, tmp_path):
    """One rank, so that values can be seen: three steps of an average, its state, and a model that takes it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    update = partial(ema_update, decay=0.7)
    whole = AveragedModel(copy.deepcopy(model), multi_avg_fn=update, use_buffers=True)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        if split:
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        average = ShardedAverage(model, update)
        for step in range(3):
            for value in local_state(model).values():
                value.add_(torch.ones_like(value) * (step + 1))
            average.update_parameters(model)
            whole.update_parameters(unsharded(model))
        assert average.state_dict().keys() == whole.state_dict().keys()
        torch.testing.assert_close(average.state_dict(), dict(whole.state_dict()))
        another = ShardedAverage(model, update)
        another.load_state_dict(average.state_dict())
        another.copy_to(model)
        torch.testing.assert_close(unsharded(model).state_dict(), whole.module.state_dict())
    finally:
        torch.distributed.destroy_process_group()


def unsharded(model: torch.nn.Module) -> torch.nn.Module:
    plain = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    plain.load_state_dict(local_state(model))  # of one rank: a shard is everything
    return plain


def test_average_refuses_flattened_weights(tmp_path):
    trainer, task, _ = train.build(configure(tmp_path))
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(ValueError, match=r"pass trainer\.strategy=fsdp, .* or callbacks\.ema=null"):
        next(callback for callback in trainer.callbacks if isinstance(callback, EMA)).setup(trainer, task, "fit")


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
