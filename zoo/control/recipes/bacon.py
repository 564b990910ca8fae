"""After the idea of BACON: latents in which words gather in their boxes."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..edits import LatentLoss, WordMask
from ..regions import box_mask
from ..registry import recipe
from ..where import Where


def outside_mass(maps: Tensor, mask: Tensor) -> Tensor:
    """`(1 - sum inside / sum)²` of maps `[…, height, width]`; 0 for a map inside of its box."""
    total = maps.sum((-2, -1))
    inside = (maps * mask.to(maps)).sum((-2, -1))
    return (1 - inside / total.masked_fill(total == 0, 1)).square().mean()


@recipe(
    "After the idea of BACON",
    "arXiv:2411.10495",
    "idea",
    hosts="UNets",
    needs="a box for each word; callback with prompts",
    cost="one evaluation with gradients in each step",
    missing="the losses at the boundaries of boxes",
)
def bacon(
    boxes: Mapping[str, Sequence[float]], *, size: Callable[[int, int | None], float] | float = 10.0, scale: int = 4
) -> list:
    """Edits that update the latents through `Control.callback`.

    Args:
        boxes: word of the Control → (left, top, right, bottom) in fractions.
        size: step size, or a function of (step, steps), ours.
        scale: latent pixels per token of the observed attentions.

    Raises:
        ValueError: a box that is empty or outside of the image.
    """
    for box in boxes.values():
        box_mask(box, (1, 1))  # which says what is wrong before anything runs
    observer = WordMask(*boxes, where=Where(kinds=("cross",), scales=(scale,)))

    def loss() -> Tensor:
        maps = observer.maps
        losses = [outside_mass(maps[:, i], box_mask(box, maps.shape[-2:])) for i, box in enumerate(boxes.values())]
        return torch.stack(losses).sum()

    return [observer, LatentLoss(loss, [observer], size if callable(size) else lambda step, total: size)]
