"""What a run shows and records: names of users as they are, bars and summaries, versions, epochs without validation."""

import csv
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from foveal import train
from foveal.zoo.tasks.console import console, say, tell
from foveal.zoo.tasks.display import Bar, Summary
from foveal.zoo.tasks.launch import make_callbacks, open_dicts
from foveal.zoo.tasks.record import PACKAGES, environment, print_summary
from foveal.zoo.tasks.report import MetricTable
from foveal.zoo.tasks.sweep import record_job
from foveal.zoo.tasks.video_plots import plot_video_curves
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar
from omegaconf import OmegaConf
from train_helpers import configure

MARKUP = "[/x] [bold]a[/] :fire: $b$"
ROOT = Path(__file__).resolve().parents[2]


def test_names_of_users_are_no_markup(tmp_path, capsys):
    say(f" {MARKUP}", lead=MARKUP)
    tell(MARKUP)
    console().print(MARKUP)
    run = tmp_path / "[bold]a" / "[/x] run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    print_summary({"test/loss": 1.0}, run)
    said = capsys.readouterr()
    assert said.out.count(MARKUP) == 3 and said.err == f"foveal-train: {MARKUP}\n"
    assert f"{run}/config.yaml" in said.out


def test_the_table_and_the_picture_of_a_sweep_take_any_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "[b]"
    folder.mkdir()
    for number, name in enumerate((MARKUP, "$")):
        job = OmegaConf.create(
            {
                "sweep": {"dir": str(folder)},
                "job": {"num": number},
                "overrides": {"task": [f"++model.args={{x: {name}}}"]},
            }
        )
        record_job(job, metric="val/acc1", mode="max", value=0.5, minutes=1.0)
    said = capsys.readouterr().out
    assert f" model.args={{x: {MARKUP}}} " in said and " model.args={x: $} " in said and "++" not in said
    assert matplotlib.image.imread(folder / "comparison.png")[:, :, :3].std() > 0.02
    assert "[b]/comparison.png" in said


@pytest.mark.parametrize(
    ("epochs", "steps", "description"),
    [(10, -1, "Epoch 9/9"), (-1, 2000, "Epoch 9, from step 90 of 2,000"), (-1, -1, "Epoch 9, from step 90")],
)
def test_the_bar_has_no_negative_number_of_epochs(epochs, steps, description):
    bar = Bar()
    bar._trainer = SimpleNamespace(max_epochs=epochs, max_steps=steps, global_step=90, sanity_checking=False)
    assert bar._get_train_description(9).strip() == description


def test_the_summary_lists_parts_with_parameters_and_known_flops(capsys):
    rows = [("Name", ["model", "metrics"]), ("Type", ["Vit[s]", "ModuleDict"]), ("Params", ["1.2 M ", "0     "])]
    Summary.summarize(rows, 1_200_000, 1_000_000, 4.8, {"train": 2, "eval": 0}, 0)
    said = capsys.readouterr().out
    assert "Vit[s]" in said and "metrics" not in said and "FLOPs" not in said
    assert "1.0 M" in said and "200 K" in said
    Summary.summarize(rows, 1_200_000, 1_200_000, 4.8, {"train": 2, "eval": 0}, 3_000_000)
    said = capsys.readouterr().out
    assert "3.0 M FLOPs" in said and "frozen" not in said


def kinds(options: dict | None, logs: bool = True, **switches) -> tuple[list[str], dict]:
    trainer = {"enable_progress_bar": True, "enable_model_summary": True} | switches
    return [type(callback).__name__ for callback in make_callbacks(options, trainer, logs=logs)], trainer


def test_switches_of_the_trainer_turn_callbacks_off_and_on():
    package = "lightning.pytorch.callbacks"
    bar = {"progress": {"_target_": "foveal.zoo.tasks.display.Bar"}}
    rate = {"rate": {"_target_": f"{package}.LearningRateMonitor"}}
    saves = {"last": {"_target_": f"{package}.ModelCheckpoint", "dirpath": "x"}}
    assert kinds(bar) == (["Bar", "Summary"], {"enable_progress_bar": True, "enable_model_summary": True})
    assert kinds(None)[0] == ["Bar", "Summary"]
    for options, switches in ((bar, {"enable_progress_bar": False}), ({"progress": None}, {})):
        names, trainer = kinds(options, **switches)
        assert names == ["Summary"] and trainer["enable_progress_bar"] is False
    assert kinds(bar | rate)[0] == ["Bar", "LearningRateMonitor", "Summary"]
    assert kinds(bar | rate, logs=False)[0] == ["Bar", "Summary"]
    assert kinds(bar | saves, enable_checkpointing=False, enable_model_summary=False)[0] == ["Bar"]


def test_a_run_without_bar_summary_checkpoints_and_logger_is_built(tmp_path):
    switches = ("trainer.enable_progress_bar=false", "callbacks=default", "+trainer.enable_checkpointing=false")
    trainer, _, _ = train.build(configure(tmp_path, "~logger", "trainer.enable_model_summary=false", *switches))
    unwanted = (ProgressBar, ModelCheckpoint, ModelSummary)
    assert not [callback for callback in trainer.callbacks if isinstance(callback, unwanted)]


def test_the_record_has_the_version_of_everything_a_run_depends_on():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [name for group in ("video", "lora") for name in project["optional-dependencies"][group]]
    needed = {name.split(">")[0].split(";")[0].strip() for name in (*project["dependencies"], *optional)}
    assert needed - {"platformdirs", "filelock", "typer", "rich"} <= set(PACKAGES)
    known = environment()
    assert {"diffusers", "pillow", "torchvision", "omegaconf"} <= known["packages"].keys()
    assert json.loads(json.dumps(known)) == known


@pytest.mark.parametrize(
    "key", ["model.args", "data.train_transform", "task.mixup", "task.optimizer", "task.scheduler"]
)
def test_arguments_that_are_passed_on_can_be_given_as_a_dict(key):
    given = [f"{key}={{window_size: 3}}", "seed=1", f"{key}=null", f"{key}.a={{b: 1}}", "trainer={a: 1}"]
    assert open_dicts(given) == ["++" + given[0], *given[1:]]
    assert open_dicts(open_dicts(given)) == open_dicts(given)
    sweep = OverridesParser.create().parse_override(open_dicts([f"{key}={{a: 1}},{{a: 2}}"])[0])
    assert sweep.is_sweep_override() and len(list(sweep.sweep_string_iterator())) == 2


def test_a_dict_of_arguments_adds_to_those_of_the_experiment():
    arguments = open_dicts(["experiment=in1k_natten_dinat_m", "model.args={window: 5}", "task.mixup={prob: 0.5}"])
    with initialize_config_module("foveal.configs", version_base="1.3"):
        config = compose("train", overrides=arguments)
    assert config.model.args == {"drop_path_rate": 0.2, "window": 5}
    assert config.task.mixup == {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.5}


def test_epochs_without_validation_have_no_values_of_it(tmp_path):
    """Their checkpoints are written all the same."""
    options = ("trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2", "trainer.limit_train_batches=1")
    config = configure(tmp_path, *options, "trainer.limit_val_batches=1", "logger=none", "data.batch_size=8")
    trainer, task, data = train.build(config)
    trainer.fit(task, datamodule=data)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [bool(row["val/loss"]) for row in rows] == [False, True, False]
    assert all(row["train/loss"] and row["lr"] for row in rows)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    rows = [{"step": 1, "lr": 1.0}, {"step": 2, "lr": 1.0, "val/loss": 2.0}]
    assert matplotlib.image.imread(plot_video_curves(rows, path=tmp_path / "x.png"))[:, :, :3].std() > 0.02


def test_the_table_goes_on_with_the_validation_of_its_epoch(tmp_path):
    """A checkpoint between validation and the end of the epoch keeps what was measured."""
    table, resumed = MetricTable(str(tmp_path)), MetricTable(str(tmp_path))
    table._validated = {"val/loss": 0.5}
    resumed.load_state_dict(table.state_dict())
    assert resumed._validated == {"val/loss": 0.5}
    resumed.load_state_dict({"rows": []})  # of an earlier version
    assert resumed._validated == {}
