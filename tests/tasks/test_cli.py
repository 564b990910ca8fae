"""`foveal-train` as a user meets it: from any folder, sweeps, the default experiment."""

import csv
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.image
import pytest
from foveal import train
from foveal.zoo.tasks.plots import plot_comparison, shorten
from foveal.zoo.tasks.sweep import record_job
from omegaconf import OmegaConf
from train_helpers import QUIET, TINY_VIT

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1")


def run(command: list[str], cwd: Path, timeout: float = 300) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_foveal_train_from_another_folder(tmp_path):
    """Without an argument it is digits_dinat; the pictures of the run are not blank."""
    said = run([str(Path(sys.executable).with_name("foveal-train")), *SHORT], tmp_path)
    (folder,) = (tmp_path / "runs" / "digits_dinat").iterdir()
    assert "test  accuracy" in said and f"runs/digits_dinat/{folder.name}/predictions.png" in said
    for name in ("curves", "predictions", "receptive_field"):
        pixels = matplotlib.image.imread(folder / f"{name}.png")[60:, :, :3]
        assert pixels.std() > 0.05, name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_sweep_compares_its_jobs(tmp_path, monkeypatch, capsys):
    arguments = (
        *QUIET,
        *TINY_VIT,
        *SHORT,
        "test=false",
        "logger=none",
        f"runs={tmp_path}",
        "task.optimizer.lr=1e-3,0.0",
    )
    monkeypatch.setattr(sys, "argv", ["foveal-train", "-m", *arguments])
    train.main()
    (folder,) = (tmp_path / "sweeps").iterdir()
    rows = list(csv.DictReader((folder / "comparison.csv").open()))
    assert {row["overrides"].split()[-1] for row in rows} == {"task.optimizer.lr=0.001", "task.optimizer.lr=0.0"}
    values = [float(row["val/acc1"]) for row in rows]
    assert all(0 < float(row["minutes"]) < 5 for row in rows)
    assert values == sorted(values, reverse=True)
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for job in ("0", "1"):
        assert (folder / job / "checkpoints" / "last.ckpt").is_file()
    said = capsys.readouterr().out
    assert (
        "Sweep so far" in said and "task.optimizer.lr=0.001" in said and "test=False" not in said.rsplit("Sweep", 1)[1]
    )


def test_the_least_comes_first_where_less_is_better(tmp_path, capsys):
    for number, value in enumerate((0.5, math.nan, 0.25, 0.75)):
        job = OmegaConf.create(
            {
                "sweep": {"dir": str(tmp_path)},
                "job": {"num": number},
                "overrides": {"task": ["test=false", f"seed={number}"]},
            }
        )
        record_job(job, metric="val/loss", mode="min", value=value, minutes=1.0)
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert [row["job"] for row in rows] == ["2", "0", "3", "1"]
    table = capsys.readouterr().out.rsplit("Sweep so far", 1)[1]
    assert table.index("seed=2") < table.index("seed=0") < table.index("seed=3") < table.index("seed=1")
    assert matplotlib.image.imread(tmp_path / "comparison.png")[:, :, :3].std() > 0.05
    with warnings.catch_warnings(action="error"):  # such as that no room is left
        plot_comparison(["a" * 200, "b" * 61], [1.0, 2.0], metric="val/loss", mode="min", path=tmp_path / "long.png")
    assert shorten("abcdef", 5) == "abcd…" and shorten("abcde", 5) == "abcde"
    with pytest.raises(ValueError, match=r"metric='val/acc1' is not in .*: pass one metric=NAME"):
        record_job(job, metric="val/acc1", mode="max", value=0.5, minutes=1.0)


def test_sweep_over_experiments_has_one_folder(tmp_path, monkeypatch):
    """Whose names differ; the jobs are compared in one table all the same."""
    short = ("trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1", "test=false")
    experiments = "experiment=digits_dinat,digits_litv2"
    monkeypatch.setattr(sys, "argv", ["foveal-train", "-m", *QUIET, *short, experiments, f"runs={tmp_path}"])
    train.main()
    (folder,) = (tmp_path / "sweeps").iterdir()
    rows = list(csv.DictReader((folder / "comparison.csv").open()))
    assert sorted(next(x for x in row["overrides"].split() if x.startswith("experiment")) for row in rows) == (
        experiments.replace(",", " experiment=").split()
    )


@pytest.mark.slow
def test_the_default_experiment_learns_the_digits(tmp_path):
    said = run([sys.executable, str(ROOT / "train.py")], tmp_path, timeout=1200)
    accuracy = float(said.split("test  accuracy ")[1].split(" %")[0])
    assert accuracy >= 98
