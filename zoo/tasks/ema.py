"""Moving average of the weights, on Lightning's callback with its traps closed."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .sharded_average import MODULE, ShardedAverage, local_state


@torch.no_grad()
def ema_update(
    averages: list[Tensor], currents: list[Tensor], num_averaged: Tensor | int, *, decay: float, warmup: bool = False
) -> None:
    """One step of the average, in place, on tensors of one device, averages of one dtype, in which the step is made;
    integer buffers (counts) are copied."""
    currents = [current.to(average.dtype) for average, current in zip(averages, currents, strict=True)]
    if averages[0].is_floating_point():
        if warmup:
            n = int(num_averaged)
            decay = min(decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(averages, currents, 1 - decay)
    else:
        torch._foreach_copy_(averages, currents)


def _values(module: nn.Module) -> list[Tensor]:
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        return list(local_state(module).values())
    return [*module.parameters(), *module.buffers()]


class EMA(WeightAveraging):
    """Exponential moving average of parameters and buffers; validation, test and `state_dict` use the average.

    What it does beyond Lightning's `EMAWeightAveraging`: before the first update of a delayed start the current weights
    are validated and saved, not an average that was never updated; a checkpoint loaded to test gives the average, not
    the raw weights; a checkpoint of the very end still holds both; weights that FSDP2 splits are averaged shard by
    shard, and their checkpoints are those of one process.

    Args:
        decay: weight of the old average in each update, 0 to 1.
        update_starting_at_step: first optimizer step, from 0, that the average follows; it begins with those weights.
        warmup: update `n` uses `min(decay, (1 + n) / (10 + n))`, so that a short run is not the average of its start.
    """

    def __init__(self, decay: float = 0.9999, update_starting_at_step: int | None = None, warmup: bool = False):
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay={decay} must be at least 0 and below 1")
        # a closure could not go to spawned processes
        super().__init__(multi_avg_fn=partial(ema_update, decay=decay, warmup=warmup))
        self.update_starting_at_step = update_starting_at_step or 0
        self._raw: list[Tensor] = []

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= self.update_starting_at_step

    @property
    def _started(self) -> bool:
        return self._average_model is not None and int(self._average_model.n_averaged) > 0  # pyright: ignore

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(
                "callbacks.ema does not work with the weights of Lightning's FSDPStrategy, which are flattened: pass "
                "trainer.strategy=fsdp, which splits each weight, or callbacks.ema=null"
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            return  # the model is split later
        with warnings.catch_warnings():  # it warns of sharding whenever configure_model is there
            warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with a model")
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the average of a sharded model: its shards are on their devices now, a checkpoint comes after this."""
        if isinstance(trainer.strategy, ModelParallelStrategy):
            self._average_model = ShardedAverage(pl_module, self._kwargs["multi_avg_fn"])  # pyright: ignore

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning exchanges both models, and an average in float32 would come back rounded to the weights' dtype."""
        if self._started:
            self._raw = [value.detach().clone() for value in _values(pl_module)]
            self._copy_average_to_current(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_back(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A signal may end validation half-way, and the checkpoint that is then written needs the raw weights."""
        self._put_back(pl_module)

    def _put_back(self, pl_module: LightningModule) -> None:
        for value, raw in zip(_values(pl_module) if self._raw else [], self._raw, strict=True):
            value.data.copy_(raw)
        self._raw = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing yet: a checkpoint may still be written at the end of training, and it needs the raw weights."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model keeps the average, also when a finished run was resumed and there was nothing left to train."""
        if self._started:
            self._copy_average_to_current(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None and not self._started:
            checkpoint["state_dict"] = checkpoint["current_model_state"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if not isinstance(self._average_model, ShardedAverage):
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
        elif "averaging_state" in checkpoint:  # else the average begins with the weights, which the strategy has read
            average = {MODULE + name: value for name, value in checkpoint["state_dict"].items()}
            self._average_model.load_state_dict(average | checkpoint["averaging_state"])

    def _copy_average_to_current(self, pl_module: LightningModule) -> None:
        if isinstance(self._average_model, ShardedAverage):
            self._average_model.copy_to(pl_module)
        else:
            super()._copy_average_to_current(pl_module)
