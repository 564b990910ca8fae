"""AttenCraft: concepts told apart by their own maps, and trained to stay apart."""

import torch
from torch import Tensor

from ..regions import normalize
from ..registry import recipe


@recipe(
    "AttenCraft, losses",
    "junjie-shentu/AttenCraft@964045f",
    "exact",
    hosts="Stable Diffusion, in training",
    needs="one image of several concepts",
    cost="columns of the identifiers",
    recorded="unet_attencraft",
)
def attencraft(maps: Tensor, masks: Tensor) -> Tensor:
    """Mean over concepts of the Jensen-Shannon divergence of softmax(map) and softmax(mask) over pixels.

    Args:
        maps, masks: `[concepts, height, width]`, or one `[height, width]`.
    """
    p, q = (x.flatten(-2).softmax(-1) for x in (maps, masks))
    middle = (p + q) / 2

    def divergence(a: Tensor) -> Tensor:
        return (a * (a.log() - middle.log())).sum(-1)

    return ((divergence(p) + divergence(q)) / 2).mean()


def classes(maps: Tensor, threshold: float = 0.1) -> Tensor:
    """Class of each pixel: the map that exceeds all others by a threshold, else their number; `[height, width]`."""
    best = maps.topk(2, dim=0)
    clear = best.values[0] > best.values[1] + threshold
    return torch.where(clear, best.indices[0], len(maps))


def concept_maps(cross: Tensor, self_map: Tensor, power: int = 4) -> Tensor:
    """`S^power · cross²`, each scaled from minimum to maximum to 0..1, as the initial step makes masks.

    Args:
        cross: maps of concepts on the tokens of the self map, `[concepts, height, width]`.
        self_map: `[tokens, tokens]`.
    """
    graph = normalize(torch.linalg.matrix_power(normalize(self_map, "minmax"), power), "minmax")
    squared = normalize(cross.square(), "minmax").flatten(1)
    return normalize((squared @ graph.T).unflatten(1, cross.shape[1:]), "minmax")
