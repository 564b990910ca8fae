"""A backbone whose stages are numbered attributes of the model, as in PVT and CSWin."""

from typing import ClassVar

import torch
from timm.layers import to_2tuple
from timm.models import checkpoint_seq
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from .agent_checkpoint import set_agent_grids, stage_grids
from .backbone import Backbone


class NumberedBackbone(Backbone):
    """A `Backbone` whose stages, sequences of blocks, are attributes such as `stage1`, `stage2`, ...

    `stages_name` has "{}" for the number of a stage; the first is 1.
    """

    stages_name: ClassVar[str] = "stage{}"
    grad_checkpointing = False

    @property
    def _stages(self) -> list[nn.Module]:  # pyright: ignore[reportIncompatibleMethodOverride]
        names = (self.stages_name.format(i) for i in range(1, len(self.feature_info) + 1))
        return [self.get_submodule(name) for name in names if hasattr(self, name)]

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        return checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)

    def _shorten(self, last: int) -> None:
        for number in range(last + 2, len(self._stages) + 1):
            delattr(self, self.stages_name.format(number))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def _grids(self, img_size: tuple[int, int]) -> list[tuple[int, int]]:
        return stage_grids(img_size, [info["reduction"] for info in self.feature_info])[: len(self._stages)]

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make another input size native: biases are interpolated. Windows and stripes stay as they were built."""
        size = to_2tuple(img_size)
        set_agent_grids(self._stages, self._grids(size))
        update_model_input_size(self, size)
