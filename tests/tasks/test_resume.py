"""A run killed with SIGKILL and resumed ends with the bits of one that was not: weights, average, optimizer, data."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_runs import ROOT, finish, kill_at
from train_helpers import TINY_VIT, differences

SETTINGS = (
    *TINY_VIT,
    "task.mixup={mixup_alpha:0.8,cutmix_alpha:1.0}",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=1",
    "callbacks=steps",
    "callbacks.last_step.every_n_train_steps=4",
    "+logger.csv.flush_logs_every_n_steps=1",
    "test=false",
)
STEPS = 3 * 19  # 1,257 training images in batches of 64


def start(runs: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *SETTINGS, f"runs={runs}", *more]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=runs.parent)


def final_state(runs: Path) -> dict:
    (path,) = runs.glob("*/*/checkpoints/last.ckpt")
    return torch.load(path, weights_only=True)


def assert_same_end(runs: Path, reference: Path) -> None:
    ours, theirs = final_state(runs), final_state(reference)
    assert ours["global_step"] == STEPS
    for state in (ours, theirs):  # paths differ
        state["callbacks"] = {key: value for key, value in state["callbacks"].items() if "ModelCheckpoint" not in key}
    parts = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "callbacks")
    assert all(ours[part] for part in (*parts, "Digits", "train_loss"))
    assert differences(ours, theirs) == []
    tables = [next(folder.glob("*/*/metrics.csv")).read_text() for folder in (runs, reference)]
    assert tables[0] == tables[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("uninterrupted") / "runs"
    finish(start(runs))
    return runs


def killed_and_resumed(runs: Path, kills: list[int]) -> int:
    """Runs to the end through SIGKILLs at the given steps; returns how many of them hit."""
    hits = 0
    for step in kills:
        hits += kill_at(start(runs, "ckpt_path=auto"), runs, step)
    finish(start(runs, "ckpt_path=auto"))
    return hits


@pytest.mark.slow
def test_killed_run_ends_like_an_uninterrupted_one(uninterrupted, tmp_path):
    rng = random.SystemRandom()
    kills = [rng.randrange(5, 19), rng.randrange(24, 50)]
    hits = killed_and_resumed(tmp_path / "runs", kills)
    assert hits == 2, f"kills at {kills}"
    assert_same_end(tmp_path / "runs", uninterrupted)


@pytest.mark.exhaustive
@pytest.mark.parametrize("attempt", range(20))
def test_killed_run_ends_like_an_uninterrupted_one_at_20_steps(uninterrupted, tmp_path, attempt):
    step = random.SystemRandom().randrange(1, STEPS)
    killed_and_resumed(tmp_path / "runs", [step])
    assert_same_end(tmp_path / "runs", uninterrupted)
