"""Tasks that go by epochs: timm's optimizers and schedules, and batches of which nothing could be read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.scheduler import create_scheduler_v2
from torch import Tensor

from ..data.foreign import reason
from ..data.names import say, unknown_name
from ._base import Task
from .optim import check_optimizer

SCHEDULERS = ("constant", "cosine", "multistep", "poly", "rsqrt", "step", "tanh", "wsd")


def fit_ramps(schedule: Mapping[str, Any], epochs: int) -> dict[str, float]:
    """Warm-up and cool-down for a run of so many epochs, where they would leave nothing between them.

    Returns:
        Their epochs, shortened to half of the run together; nothing where they fit.
    """
    ramps = {key: schedule.get(key) or 0 for key in ("warmup_epochs", "cooldown_epochs")}
    total = sum(ramps.values())
    if total == 0 or total < epochs:
        return {}
    shorter = {key: length * epochs / (2 * total) for key, length in ramps.items()}
    told = ", ".join(f"{key} from {ramps[key]:g} to {length:.3g}" for key, length in shorter.items() if length)
    say(f"task.scheduler does not fit into trainer.max_epochs={epochs}, and is shortened: {told}")
    return shorter


class EpochTask(Task):
    """Trains on data of known length by a schedule in epochs. Batches are sequences that begin with the items.

    Args:
        optimizer: arguments of `timm.optim.create_optimizer_v2`: `opt`, `lr`, `weight_decay`, `layer_decay`, ….
        scheduler: arguments of `timm.scheduler.create_scheduler_v2`, in epochs, stepped at every update;
            `trainer.max_epochs` minus `cooldown_epochs` is its length. Warm-up and cool-down that leave nothing of a
            short run are shortened to half of it.
        lr_batch: batch size that `optimizer.lr` and the scheduler's `warmup_lr` and `min_lr` are for; they grow in
            proportion to the batch of all devices. None: they are taken as they are.
        options: `metrics`, `compile` and `seed` of `Task`.

    Raises:
        ValueError: an unknown optimizer or schedule; the nearest names are in the message.
    """

    def __init__(
        self,
        *,
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any] | None = None,
        lr_batch: int | None = None,
        **options: Any,
    ):
        check_optimizer(optimizer)
        name = (scheduler or {}).get("sched", "cosine")
        if name not in SCHEDULERS:
            raise unknown_name("task.scheduler.sched", name, SCHEDULERS)
        super().__init__(optimizer=optimizer, scheduler=scheduler, **options)
        self.lr_batch = lr_batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(batch[0]) == 0:  # nothing of the batch could be read
            return 0.0 * sum(parameter.float().sum() for parameter in self.parameters())  # pyright: ignore
        return super().training_step(batch, batch_idx)

    def updates_per_epoch(self) -> int:
        """Return the optimizer's steps of an epoch.

        Raises:
            ValueError: the data do not know their length.
        """
        self.trainer.estimated_stepping_batches  # noqa: B018 - makes the loaders, so that the epoch has a length
        if math.isinf(self.trainer.num_training_batches):
            raise ValueError("this dataset does not know its length: set trainer.limit_train_batches to a number")
        return math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

    def learning_rate_scale(self) -> float:
        self.updates_per_epoch()  # refuses endless data also without a schedule
        data = getattr(self.trainer, "datamodule")  # noqa: B009 - set by Trainer.fit
        batch = data.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
        return batch / self.lr_batch if self.lr_batch else 1.0

    def make_scheduler(self, optimizer: torch.optim.Optimizer, scale: float) -> Any:
        schedule, updates = dict(self.scheduler_cfg), self.updates_per_epoch()
        for key in ("warmup_lr", "min_lr"):
            if key in schedule:
                schedule[key] *= scale
        epochs = self.trainer.max_epochs or -1
        if epochs < 1:
            epochs = math.ceil(self.trainer.max_steps / updates)
        schedule |= fit_ramps(schedule, epochs)
        length = epochs - schedule.get("cooldown_epochs", 0)
        options = {"num_epochs": length, "step_on_epochs": False, "updates_per_epoch": updates}
        try:
            scheduler, _ = create_scheduler_v2(optimizer, **options, **schedule)
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"task.scheduler={self.scheduler_cfg} does not work: {reason(error)}") from error
        return scheduler

    def lr_scheduler_step(self, scheduler, metric) -> None:
        scheduler.step_update(self.global_step)
