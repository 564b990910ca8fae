"""Portable part of a run's checkpoint: the weights under the model's own names, and how to build the model."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from timm.models._input import get_model_args

from ...weights.training import CONFIG, model_names
from .ema import EMA


def make_portable(task: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Adds `state_dict_ema` to a checkpoint that is being saved: its `state_dict` under the names of `task.model`.

    timm and `foveal.weights.load` look there first, and find the averaged weights where there is an average. The
    tensors are those of `state_dict`, so that the file does not grow. A checkpoint of weights alone, which Lightning
    saves past its callbacks, gets the average here and no raw weights.
    """
    if "callbacks" not in checkpoint:
        for callback in task.trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, EMA):
                callback.on_save_checkpoint(task.trainer, task, checkpoint)
        for key in ("current_model_state", "averaging_state"):
            checkpoint.pop(key, None)
    checkpoint["state_dict_ema"] = model_names(checkpoint["state_dict"])


def describe_model(task: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Adds `timm_config` to a checkpoint that is being saved, in the words of timm's `config.json`.

    `architecture`, `model_args` and `num_classes` build `task.model`; `label_names` are the classes in the order of the
    outputs; `targets`, where an image has not just one class, is "labels" or "values"; `prompts` are arguments of
    `add_prompts`; `pretrained_cfg` is the preprocessing of the images that it was evaluated on and, where training
    began with released weights, their license and origin. Facts that are not known are left out.
    """
    name, pretrained = task.model_cfg["name"], task.model_cfg.get("pretrained")  # pyright: ignore
    data = getattr(task.trainer, "datamodule", None)
    cfg: dict[str, Any] = getattr(task.model, "pretrained_cfg", {})  # pyright: ignore[reportAssignmentType]
    origin = {key: cfg[key] for key in ("license", "origin_url") if pretrained and cfg.get(key)}
    config = {
        "architecture": cfg.get("architecture", name.split(".")[0]),
        "model_args": get_model_args(task.model),  # pyright: ignore[reportArgumentType]
        "num_classes": task.num_classes,
        "pretrained_cfg": getattr(data, "preprocessing", {}) | origin,
    }
    if getattr(task, "tuning", None) == "prompt":
        config["prompts"] = dict(task.prompt)  # pyright: ignore
    names = task.hparams.get("class_names")
    kind = getattr(task, "targets", "class")
    config |= {"targets": kind} if kind != "class" else {}
    checkpoint[CONFIG] = config | ({"label_names": list(names)} if names else {})
