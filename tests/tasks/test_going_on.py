"""Runs that go on: what does not fit is refused before anything is written, what changes is used and recorded."""

import csv
import json
from pathlib import Path

import pytest
import torch
from foveal import train
from foveal.zoo.tasks.launch import find_start
from foveal.zoo.tasks.optim import seek
from foveal.zoo.tasks.resume import differing
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer import Trainer
from train_helpers import configure
from video_tasks import task_alone

SHORT = (
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "data.batch_size=16",
    "logger=none",
    "callbacks.best=null",
)


def files(run: Path) -> dict[str, bytes]:
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """A run of two epochs with AdamW and a cosine schedule over them, trained and tested to its end."""
    run = tmp_path_factory.mktemp("ended") / "run"
    train.train(configure(run, *SHORT, "trainer.max_epochs=2"))
    return run


def go_on(run: Path, *overrides: str, here: Path | None = None) -> float:
    config = configure(here or run, *SHORT, "trainer.max_epochs=3", *overrides)
    config.ckpt_path = str(run / "checkpoints" / "last.ckpt")
    return train.train(config)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "task.optimizer.opt=sgd",
            r"task\.optimizer\.opt='sgd' cannot go on from .*last\.ckpt, which was made with 'adamw'",
        ),
        ("task.optimizer.opt=lamb", r"'lamb' cannot go on from .* made with 'adamw': pass task\.optimizer\.opt=adamw"),
        ("task.optimizer.layer_decay=0.7", r"in other groups: task\.optimizer\.layer_decay None → 0\.7"),
        ("task.optimizer.weight_decay=0", r"in other groups: task\.optimizer\.weight_decay 0\.05 → 0"),
        (
            "model.args.embed_dim=48",
            r"does not fit the model: .* first model\.cls_token, .*model\.args\.embed_dim 32 → 48",
        ),
        ("model.args.depth=3", r"\d+ of \d+ weights differ, .* missing in the checkpoint .*model\.args\.depth 2 → 3"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(ended, override, sentence):
    before = files(ended)
    with pytest.raises(ValueError, match=sentence):
        go_on(ended, override)
    assert files(ended) == before


class Groups(Callback):
    """The optimizer's groups at the first and at the last step of a run."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in trainer.optimizers[0].param_groups
        ]
        self.first, self.last = getattr(self, "first", groups), groups


def watched(config, checkpoint: Path | None) -> list[dict]:
    trainer, task, data = train.build(config)
    trainer.callbacks = [groups := Groups(), *trainer.callbacks]
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return groups.last


def test_changed_values_of_the_optimizer_are_used(ended, tmp_path):
    """Learning rate without a schedule, weight decay but where there is none, and what the configuration did not say
    before; the steps that the optimizer counted stay."""
    plain = ("trainer.max_epochs=3", "task.scheduler=null", "+task.optimizer.eps=1e-5", "task.optimizer.lr=9e-3")
    config = configure(tmp_path, *SHORT, *plain, "task.optimizer.weight_decay=0.2")
    groups = watched(config, ended / "checkpoints" / "last.ckpt")
    assert {group["lr"] for group in groups} == {9e-3} and {group["eps"] for group in groups} == {1e-5}
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.2]
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert {float(state["step"]) for state in saved["optimizer_states"][0]["state"].values()} == {6.0}


@pytest.mark.parametrize(
    "schedule",
    [
        ("task.scheduler.warmup_epochs=0",),
        ("task.scheduler.warmup_epochs=1", "task.optimizer.lr=9e-3"),
        (
            "task.scheduler=null",
            "++task.scheduler.sched=step",
            "++task.scheduler.decay_epochs=1",
            "++task.scheduler.decay_rate=0.5",
        ),
    ],
    ids=["longer", "lr", "another"],
)
def test_the_schedule_is_the_one_of_the_configuration(ended, tmp_path, schedule):
    """After two of three epochs the rate is what a whole run of three epochs has, not that of a run of two."""
    options = (*SHORT, "trainer.max_epochs=3", "callbacks.report=null", "callbacks.last=null", *schedule)
    whole = watched(configure(tmp_path / "whole", *options), None)
    resumed = watched(configure(tmp_path / "resumed", *options), ended / "checkpoints" / "last.ckpt")
    assert [group["lr"] for group in resumed] == [group["lr"] for group in whole]


def test_schedules_of_videos_follow_the_configuration_too():
    tasks = [task_alone(scheduler={"name": "cosine", "warmup_steps": 2}) for _ in range(2)]
    settings = []
    for task in tasks:
        task._trainer = Trainer(max_epochs=-1, max_steps=9, logger=False, enable_checkpointing=False)
        settings.append(task.configure_optimizers())
    (walked, schedule), (jumped, other) = ((s["optimizer"], s["lr_scheduler"]["scheduler"]) for s in settings)
    for _ in range(5):
        walked.step()
        schedule.step()
    seek(other, 5)
    assert jumped.param_groups[0]["lr"] == walked.param_groups[0]["lr"] == schedule.get_last_lr()[0]
    assert other.state_dict() == schedule.state_dict()
    for optimizer, each in ((walked, schedule), (jumped, other)):
        optimizer.step()
        each.step()
    assert jumped.param_groups[0]["lr"] == walked.param_groups[0]["lr"]
    with pytest.raises(TypeError, match="ReduceLROnPlateau cannot be set to a step"):
        seek(torch.optim.lr_scheduler.ReduceLROnPlateau(walked), 5)


def test_changes_are_said_and_recorded(ended, tmp_path, capsys):
    run = tmp_path / "copy"
    run.mkdir()
    for name, content in files(ended).items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    go_on(run, "task.optimizer.lr=9e-3")
    said = " ".join(capsys.readouterr().out.split())
    assert "changed: task.optimizer.lr 0.001 → 0.009, trainer.max_epochs 2 → 3" in said
    first, second = json.loads((run / "environment.json").read_text())
    assert first["changed"] == {} and first["goes_on_from"] is None
    assert second["changed"] == {"task.optimizer.lr": [0.001, 0.009], "trainer.max_epochs": [2, 3]}
    assert second["goes_on_from"] == str(run / "checkpoints" / "last.ckpt")
    assert set(second["ended"]["metrics"]) >= {"val/acc1", "test/acc1"}
    assert [row["epoch"] for row in csv.DictReader((run / "metrics.csv").open())] == ["0", "1", "2"]


def test_patience_is_the_one_of_the_configuration(tmp_path):
    """And a run that early stopping ended is not trained on."""
    options = (*SHORT, "callbacks=early_stopping", "+callbacks.early_stopping.min_delta=2.0", "test=false")
    run = tmp_path / "run"
    train.train(configure(run, *options, "trainer.max_epochs=9", "callbacks.early_stopping.patience=1"))
    assert len(list(csv.DictReader((run / "metrics.csv").open()))) == 2
    before = files(run)
    config = configure(run, *options, "trainer.max_epochs=9", "callbacks.early_stopping.patience=1")
    config.runs, config.ckpt_path = str(tmp_path / "runs"), "auto"
    assert find_start(config).evaluates
    train.train(config)
    assert files(run) == before
    more = configure(run, *options, "trainer.max_epochs=9", "callbacks.early_stopping.patience=2")
    more.ckpt_path = "auto"
    train.train(more)
    assert len(list(csv.DictReader((run / "metrics.csv").open()))) == 3


@pytest.mark.parametrize("given", [True, False], ids=["run_dir", "none"])
def test_evaluating_a_run_changes_nothing_in_it(ended, tmp_path, capsys, given):
    before = files(ended)
    config = configure(ended, *SHORT, "trainer.max_epochs=2", "data.img_size=32", "seed=3")
    config.runs, config.ckpt_path = str(tmp_path / "runs"), str(ended / "checkpoints" / "last.ckpt")
    config.run_dir = str(ended) if given else None
    train.train(config)
    assert files(ended) == before
    (results,) = (tmp_path / "runs" / "unnamed").iterdir()
    assert {"config.yaml", "environment.json", "predictions.png"} <= files(results).keys()
    (start,) = json.loads((results / "environment.json").read_text())
    assert start["ended"]["metrics"]["test/acc1"] >= 0 and start["changed"] == {"seed": [0, 3]}
    said = " ".join(capsys.readouterr().out.split())
    assert f"evaluates {ended}/checkpoints/last.ckpt" in said and f"everything goes to {results}" in said


def test_a_run_that_was_killed_before_its_test_is_finished_in_place(ended, tmp_path):
    starts = json.loads((ended / "environment.json").read_text())
    config = configure(ended, *SHORT, "trainer.max_epochs=2")
    config.ckpt_path = "auto"
    assert find_start(config).evaluates
    text = (ended / "environment.json").read_text()
    (ended / "environment.json").write_text(json.dumps([starts[0] | {"ended": None}]))
    start = find_start(config)
    (ended / "environment.json").write_text(text)
    assert not start.evaluates and start.run_dir == ended


def test_differences_of_configurations():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": {}}
    assert differing(old, {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": {}}) == {}
    changed = differing(old, {"a": {"b": 2, "c": [1]}, "d": {"f": 3}, "e": {}}, "x")
    assert changed == {"x.a.b": (1, 2), "x.a.c": ([1, 2], [1]), "x.d.f": (None, 3)}
