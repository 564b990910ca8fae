"""UnifyEdit: latents that keep the source's self-attention while the edited word's attention gathers in a mask."""

from math import exp

import torch
from torch import Tensor

from ...sites import Schedule
from ..edits import LatentLoss, SelfMaps, WordMask
from ..registry import recipe
from ..where import Where

RATES = {"color": 0.05, "texture": 0.08, "background": 0.08, "object": 0.15, "style": 0.1, "face": 0.25}


def self_loss(source: Tensor, target: Tensor) -> Tensor:
    """`sum (A_source - A_target)²` of self-attention maps."""
    return (source.detach() - target).square().sum()


def concentration(maps: Tensor, mask: Tensor) -> Tensor:
    """Mean of a word's map inside over that outside of a mask, `[…, tokens]`; 1 for a uniform map."""
    mask = mask.to(maps)
    inside = (maps * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return inside / ((maps * (1 - mask)).sum(-1) / (1 - mask).sum(-1).clamp(min=1))


def balance(step: int, *, rate: float, size: float = 5.0) -> tuple[float, float]:
    """Weights of both normalized gradients n steps after the start: `β (1 - e^(-k n))` and `β e^(-k n)`."""
    return size * (1 - exp(-rate * step)), size * exp(-rate * step)


@recipe(
    "UnifyEdit",
    "arXiv:2504.05594",
    "partial",
    hosts="Stable Diffusion",
    needs="null-text inversion, a mask, two branches; maps='allow', callback with prompts",
    cost="one evaluation with gradients in half of the steps; self maps up to 32 x 32",
    missing="the form of the cross-attention loss (a square of the sum here; its gradient is normalized)",
)
def unifyedit(
    word: str, mask: Tensor, *, kind: str = "color", until: float = 0.5, most: int = 1024, scale: int = 4
) -> list:
    """Edits for a Control with branches=("source", "target") and maps="allow".

    Args:
        word: of the Control, that is edited.
        mask: of the edit, `[height, width]`.
        kind: of the edit, a key of `RATES`.
        until: fraction of the steps that are optimized.
        most: tokens of the largest self-attention map; the paper takes all of them.
        scale: latent pixels per token of the word's maps.
    """
    self_maps = SelfMaps(most=most)
    words = WordMask(word, branch="target", where=Where(kinds=("cross",), scales=(scale,)))

    def losses() -> tuple[Tensor, Tensor]:
        structure = torch.stack([self_loss(*maps.chunk(2)) for maps in self_maps.found.values()]).sum()
        maps = words.maps[:, 0]
        from_mask = torch.nn.functional.interpolate(mask.float()[None, None], size=maps.shape[-2:])[0, 0] > 0.5
        return structure, -concentration(maps.flatten(1), from_mask.flatten()).sum().square()

    schedule = Schedule(steps=(None, float(until)))
    size = lambda step, total: balance(step, rate=RATES[kind])  # noqa: E731
    return [self_maps, words, LatentLoss(losses, [self_maps, words], size, mask=mask.float(), schedule=schedule)]
