"""Fully sharded training (FSDP2): one strategy for one machine or many."""

from __future__ import annotations

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh


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


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Splits the parameters of every repeated block, and those of the rest together, over the data-parallel devices."""
    from torch.distributed.fsdp import fully_shard

    data_parallel = mesh["data_parallel"]
    for block in repeated_blocks(model):
        fully_shard(block, mesh=data_parallel)
    fully_shard(model, mesh=data_parallel)


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices of all machines; checkpoints are single files that one process loads.

    Lightning's `FSDPStrategy` (FSDP1) shows the optimizer flattened parameters, so that timm could no longer tell
    biases and norms, which get no weight decay, from matrices.
    """

    def __init__(self):
        super().__init__(data_parallel_size="auto", tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # Lightning's "auto" is the number of machines
        super().setup_environment()
