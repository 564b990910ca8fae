"""Fully sharded training (FSDP2): one strategy for one machine or many."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from .resume import check_groups, check_weights


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The innermost modules that a model repeats (two or more of one class in a row), such as transformer blocks."""
    blocks: list[nn.Module] = []
    for container in model.modules():
        if not isinstance(container, nn.Sequential | nn.ModuleList):
            continue
        children = list(container.children())
        same = len(children) > 1 and len({type(child) for child in children}) == 1
        if same and any(True for _ in children[0].children()):
            blocks.extend(children)
    outer = {id(block) for block in blocks if any(id(inner) in map(id, blocks) for inner in list(block.modules())[1:])}
    return [block for block in blocks if id(block) not in outer]


def shard(model: nn.Module, mesh: DeviceMesh, *, precision: str = "32-true") -> None:
    """Splits the parameters of every repeated block, and those of the rest together, over the data-parallel devices.

    Args:
        precision: of the trainer. With "bf16-mixed" the optimizer keeps its weights in float32; forward and backward
            gather them as bfloat16, half as much to send, and gradients are summed in float32.
    """
    options: dict[str, Any] = {"mesh": mesh["data_parallel"]}
    if precision == "bf16-mixed":  # autocast casts the inputs where it may: times must stay float32
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for block in repeated_blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices of all machines; checkpoints are single files that one process loads.

    Lightning's `FSDPStrategy` (FSDP1) shows the optimizer flattened parameters, so that timm could no longer tell
    biases and norms, which get no weight decay, from matrices.

    Optimizer states are numbered as in any other PyTorch checkpoint, in the order of the optimizer's groups. Lightning
    numbers them in the order of the model, which is another order as soon as some parameters get no weight decay.
    """

    def __init__(self):
        super().__init__(data_parallel_size="auto", tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # Lightning's "auto" is the number of machines
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole optimizer state on rank 0, as one process would save it; empty on the other ranks."""
        assert self.model is not None
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        named: dict[str, Any] = dict(get_optimizer_state_dict(self.model, optimizer, options=options))
        if self.global_rank != 0:
            return {}
        names = [name for group in named["param_groups"] for name in group["params"]]
        number = {name: i for i, name in enumerate(names)}
        groups = [group | {"params": [number[name] for name in group["params"]]} for group in named["param_groups"]]
        return {"state": {number[name]: state for name, state in named["state"].items()}, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: str | os.PathLike, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a single file, saved sharded or not, and gives every rank its part of weights and optimizer states."""
        assert self.model is not None
        path = self.broadcast(checkpoint_path)
        checkpoint = self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        options = StateDictOptions(full_state_dict=True)
        weights = checkpoint["state_dict"]  # an average, where there is one
        if self.lightning_module is not None and self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            weights = checkpoint.get("current_model_state", weights)  # the optimizer's state belongs to these
        check_weights(self.model.state_dict(), weights, path=Path(path))
        set_model_state_dict(self.model, weights, options=options)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            check_groups(optimizer, saved, path=Path(path), changes={})
            order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
            groups = [group | {"params": [order[i] for i in group["params"]]} for group in saved["param_groups"]]
            state = {"state": {order[i]: value for i, value in saved["state"].items()}, "param_groups": groups}
            set_optimizer_state_dict(self.model, optimizer, state, options=options)
        return checkpoint
