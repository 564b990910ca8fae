"""Moving average of weights that FSDP2 has split: each rank averages the shards that it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

MODULE = "module."  # before the names of weights in the state of an `AveragedModel`


def local_state(module: nn.Module) -> dict[str, Tensor]:
    """This rank's shards of the parameters and buffers of a module, by name; they share memory with the module.

    `state_dict` first drops what the last forward pass gathered and kept, so that the next one gathers anew.
    """
    return {name: _local(value) for name, value in module.state_dict().items()}


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _kept(value: Tensor) -> Tensor:
    """A copy that small steps do not vanish in."""
    half = value.is_floating_point() and value.element_size() < 4
    return value.detach().to(torch.float32 if half else value.dtype, copy=True)


class ShardedAverage:
    """Stands for `torch.optim.swa_utils.AveragedModel`, which copies a whole module and cannot copy a sharded one.

    Args:
        module: with its parameters on their devices, split or not.
        update: called with averages, current values and the number of updates so far, tensors of one dtype and device.
    """

    def __init__(self, module: nn.Module, update: Callable[[list[Tensor], list[Tensor], Tensor], None]):
        self.update = update
        self.n_averaged = torch.tensor(0)
        self.values = {name: _kept(value) for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update_parameters(self, module: nn.Module) -> None:
        """One step; the first copies the weights."""
        groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for name, current in local_state(module).items():
            average = _local(self.values[name])
            if self.n_averaged == 0:
                average.copy_(current)
            averages, currents = groups.setdefault((average.device, average.dtype), ([], []))
            averages.append(average)
            currents.append(current)
        if self.n_averaged > 0:
            for averages, currents in groups.values():
                self.update(averages, currents, self.n_averaged)
        self.n_averaged += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Gives the module the average as its weights."""
        for name, current in local_state(module).items():
            current.copy_(_local(self.values[name]))

    def state_dict(self) -> dict[str, Tensor]:
        """State of the `AveragedModel` that one process would have, on the CPU: `n_averaged`, and whole weights where
        the rank is 0. Every rank has to ask."""
        state, first = {"n_averaged": self.n_averaged.clone()}, not _distributed() or torch.distributed.get_rank() == 0
        for name, value in self.values.items():  # one at a time: a device never holds more than one whole weight
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if first:
                state[MODULE + name] = whole.cpu().clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes this rank's shards of whole weights, which every rank has read."""
        self.n_averaged.copy_(state["n_averaged"])
        for name, value in self.values.items():
            whole = state[MODULE + name].to(device=value.device, dtype=value.dtype)
            if isinstance(value, DTensor):
                value.copy_(distribute_tensor(whole, value.device_mesh, value.placements, src_data_rank=None))
            else:
                value.copy_(whole)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
