"""A-STAR: latents in which the maps of concepts do not overlap and keep what they had."""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from ..edits import LatentLoss, WordMask
from ..registry import recipe
from ..where import Where


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """`sum min(a, b) / sum (a + b)`: 1/2 for equal maps, 0 for disjoint ones."""
    total = (a + b).sum()
    return torch.minimum(a, b).sum() / total.masked_fill(total == 0, 1)


def segregation(maps: Sequence[Tensor]) -> Tensor:
    """Overlap of each pair of concepts, added up."""
    return torch.stack([overlap(a, b) for a, b in combinations(maps, 2)]).sum()


def retention(maps: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """1 minus the overlap of each map with its binarized map of the step before; 1/2 for each concept at best."""
    return torch.stack([1 - overlap(a, b) for a, b in zip(maps, before, strict=True)]).sum()


@recipe(
    "A-STAR",
    "arXiv:2306.14544",
    "partial",
    hosts="Stable Diffusion",
    needs="two concepts or more; callback with prompts",
    cost="one evaluation with gradients in each step",
    missing="the threshold of the binarization, the step size, smoothing and normalization of maps",
)
def astar(
    words: Sequence[str],
    *,
    threshold: float = 0.5,
    size: Callable[[int, int | None], float] = lambda step, total: 20.0 * (1 - step / (total or 50)) ** 0.5,
    scale: int = 4,
) -> list:
    """Edits that update the latents through `Control.callback`.

    Args:
        words: of the Control, two at least.
        threshold: of maps over their maximum, ours.
        size: step size by (step, steps), ours; 0 is neutral.
        scale: latent pixels per token of the observed attentions.

    Raises:
        ValueError: fewer than two words.
    """
    if len(words) < 2:
        raise ValueError(f"words={tuple(words)} must be two concepts or more")
    observer = WordMask(*words, where=Where(kinds=("cross",), scales=(scale,)))
    kept: list[Tensor] = []

    def loss() -> Tensor:
        maps = observer.maps.mean(0)
        maps = [m / m.amax().clamp(min=1e-12) for m in maps]
        total = segregation(maps)
        if kept:
            total = total + retention(maps, kept)
        kept[:] = [(m > threshold).to(m).detach() for m in maps]
        return total

    return [observer, LatentLoss(loss, [observer], size)]
