"""Poses in space from poses in the image, measured by distances of joints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..data.loader import PADDING
from ..pose import PoseLifter, aligned, joint_errors, velocity_errors
from ._base import mean_metrics
from .epochs import EpochTask
from .model import told_as


class PoseTask(EpochTask):
    """Trains `PoseLifter` on `(image [B, T, J, 2], space [B, T, J, 3], number)`; distances are in units of the data.

    The loss is the mean distance of joints. Measured are that (`mpjpe`), after the best similarity transform per frame
    (`p_mpjpe`), of steps from frame to frame (`mpjve`), and that of the mean pose in training (`mpjpe_mean`).

    Args:
        lifter: arguments of `PoseLifter` beside those of the data.
        frames, joints: of the data.
        optimizer, scheduler, lr_batch, compile, seed: as in `EpochTask`.

    Raises:
        ValueError: arguments that the model does not take.
    """

    progress_metric = "val_mpjpe"
    mean_pose: Tensor

    def __init__(self, *, lifter: Mapping[str, Any], frames: int, joints: int, **options: Any):
        names = ("loss", "mpjpe", "p_mpjpe", "mpjve", "mpjpe_mean")
        super().__init__(metrics=mean_metrics(*names), **options)
        self.save_hyperparameters()
        self.lifter_cfg, self.facts = dict(lifter), {"frames": frames, "joints": joints}
        self.register_buffer("mean_pose", torch.zeros(joints, 3))
        self.register_buffer("seen", torch.zeros(()))

    def make_model(self) -> nn.Module:
        with told_as("task.lifter", self.lifter_cfg):
            return PoseLifter(**self.facts, **self.lifter_cfg)

    def training_loss(self, batch: Any) -> Tensor:
        image, space, _ = batch
        with torch.no_grad():  # mean over all training sequences so far
            self.seen += len(space)
            self.mean_pose += (space.mean((0, 1)) - self.mean_pose) * len(space) / self.seen
        return joint_errors(self.model(image).float(), space).mean()

    def evaluate(self, split: str, batch: Any, batch_idx: int) -> None:
        image, space = (x[batch[2] != PADDING] for x in batch[:2])
        if not len(image):
            return
        found = self.model(image).float()
        errors = joint_errors(found, space)
        measured = {
            "loss": errors,
            "mpjpe": errors,
            "p_mpjpe": joint_errors(aligned(found, space), space),
            "mpjve": velocity_errors(found, space),
            "mpjpe_mean": joint_errors(self.mean_pose.expand_as(space), space),
        }
        for name, x in measured.items():
            self.metrics[f"{split}_{name}"].update(x)  # pyright: ignore
