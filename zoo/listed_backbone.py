"""A backbone whose stages are plain sequences of blocks; what stands before each is in a list of its own."""

from typing import ClassVar

import torch
from timm.models import checkpoint_seq
from torch import Tensor, nn

from .backbone import Backbone


class Blocks(nn.Sequential):
    """A stage that is nothing but its blocks; `[B, H, W, C]`."""

    grad_checkpointing = False

    def forward(self, input: Tensor) -> Tensor:
        return checkpoint_seq(self, input) if self.grad_checkpointing else super().forward(input)


class ListedBackbone(Backbone):
    """A `Backbone` with `downsample_layers`, of which the first is the stem, and `stages`."""

    stages_name: ClassVar[str] = "stages"
    downsample_layers: nn.ModuleList
    stages: nn.Sequential

    @property
    def patch_embed(self) -> nn.Module:
        """The stem."""
        return self.downsample_layers[0]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that order parameters by depth (layer decay, freezing)."""
        fine = [(r"^downsample_layers\.(\d+)", (0,)), (r"^stages\.(\d+)\.(?:blocks\.)?(\d+)", None)]
        return {
            "stem": r"^downsample_layers\.0",
            "blocks": r"^(?:stages|downsample_layers)\.(\d+)" if coarse else [*fine, (r"^(?:extra_)?norm", (99999,))],
        }

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        return stage(x)

    def _down(self, index: int, x: Tensor) -> Tensor:
        return self.downsample_layers[index + 1](x)

    def _shorten(self, last: int) -> None:
        self.stages = self.stages[: last + 1]
        self.downsample_layers = self.downsample_layers[: last + 1]
