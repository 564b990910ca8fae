"""Shared by the tests of training: configurations of runs that take a second, and what to compare."""

import copy
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from foveal import train
from hydra import compose, initialize_config_module
from lightning.pytorch import Callback
from omegaconf import DictConfig

TINY_VIT = (
    "model=timm",
    "model.name=vit_tiny_patch16_224",
    "model.args={img_size:32,patch_size:8,embed_dim:32,depth:2,num_heads:2,drop_path_rate:0.2,proj_drop_rate:0.1}",
)
QUIET = ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "callbacks.progress=null")


@cache
def _composed(*overrides: str) -> DictConfig:
    with initialize_config_module("foveal.configs", version_base="1.3"):
        return compose("train", overrides=list(overrides))


def configure(run_dir: Path, *overrides: str, tiny: bool = True) -> DictConfig:
    """The default experiment to run in `run_dir`; `tiny`, with a tiny ViT that has dropout in place of its model."""
    config = copy.deepcopy(_composed(*QUIET, *(TINY_VIT if tiny else ()), *overrides))
    config.run_dir = str(run_dir)
    return config


def differences(a, b, where: str = "") -> list[str]:
    """Paths of everything that is not bitwise equal in two nested states."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in a.keys() | b.keys() for d in differences(a.get(key), b.get(key), f"{where}/{key}")]
    if type(a) is not type(b):
        return [where]
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [where]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}/{i}")]
    return [] if a == b else [where]


class Crash(Exception):
    """The end of a run by a fault."""


class CrashAt(Callback):
    """Ends a run by `Crash` after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Crash


def assert_one_sentence(
    arguments: Sequence[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Assert that the command refuses these arguments with one line that holds the sentence, and no traceback."""
    monkeypatch.setattr(sys, "argv", ["foveal-train", *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv("FOVEAL_ONE_SENTENCE", "0")
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    said = [line for line in lines if line.startswith("foveal-train: ")]
    assert len(said) == 1 and sentence in said[0], lines
    assert "Traceback" not in "\n".join(lines)
