"""Classify a scene from a few glimpses of it, which a canvas keeps together (CanViT, arXiv:2603.22570)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...layers.canvas import CanvasViT, sample_glimpse


def random_viewpoints(
    batch: int, count: int, *, least: float, most: float = 1.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Viewpoints inside of scenes.

    Args:
        batch, count: scenes, and viewpoints of each.
        least, most: half sides of the seen parts, in (0, 1].
        generator: of the draws; PyTorch's default generator if None.

    Returns:
        centers (row, column) in [-1, 1] `[count, batch, 2]`, and scales `[count, batch]`.
    """
    scale = least + (most - least) * torch.rand(count, batch, generator=generator)
    center = (2 * torch.rand(count, batch, 2, generator=generator) - 1) * (1 - scale)[..., None]
    return center, scale


class GlimpseClassifier(nn.Module):
    """Logits of a scene after each of its glimpses, from the class token that they hand on.

    The published model is trained to predict the features of a frozen teacher at the cells of the canvas; here labels
    teach it, through all glimpses.

    Args:
        num_classes: outputs.
        glimpse: pixels a side of what a glimpse gets, whatever the part of the scene.
        glimpses: of a scene.
        least, most: half sides of the parts, see `random_viewpoints`.
        whole_first: the first glimpse is of the whole scene.
        **canvas: arguments of `CanvasViT`.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        glimpse: int = 16,
        glimpses: int = 4,
        least: float = 0.25,
        most: float = 0.5,
        whole_first: bool = False,
        **canvas: Any,
    ):
        super().__init__()
        if not 0 < least <= most <= 1 or glimpses < 1:
            raise ValueError(f"least={least} and most={most} must lie in (0, 1], and glimpses={glimpses} be at least 1")
        self.glimpse, self.glimpses, self.least, self.most, self.whole_first = (
            glimpse,
            glimpses,
            least,
            most,
            whole_first,
        )
        self.trunk = CanvasViT(**canvas)
        width = self.trunk.recurrent_cls_init.shape[-1]
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def viewpoints(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Viewpoints of scenes, as `random_viewpoints` has them."""
        options = {"least": self.least, "most": self.most, "generator": generator}
        center, scale = random_viewpoints(batch, self.glimpses, **options)
        if self.whole_first:
            center[0], scale[0] = 0.0, 1.0
        return center, scale

    def forward(self, scenes: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Scenes `[B, C, H, W]` to logits after each glimpse, `[B, glimpses, classes]`."""
        state, found = None, []
        for center, scale in zip(*(x.to(scenes) for x in self.viewpoints(len(scenes), generator)), strict=True):
            state = self.trunk(sample_glimpse(scenes, center, scale, self.glimpse), center, scale, state)
            found.append(self.fc(self.norm(state.cls[:, 0])))
        return torch.stack(found, dim=1)
