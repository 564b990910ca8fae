"""Attention modulation: early self-attention is sharper, and words count by what they are."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...sites import Schedule
from ..edits import Reweight, Temperature
from ..registry import recipe


@recipe(
    "Attention modulation",
    "arXiv:2404.13899",
    "partial",
    hosts="SDXL",
    needs="entities of the prompt",
    cost="none",
    missing="temperature, phases and weights (arguments here)",
)
def attention_modulation(
    weights: Mapping[str, float], *, temperature: float = 1.0, until: float = 0.2, weights_until: float = 1.0
) -> list:
    """Edits of one phase.

    Args:
        weights: word of the Control → factor on its map; 1 is neutral.
        temperature: of self-attention in the first steps; 1 is neutral.
        until, weights_until: fractions of the steps.
    """
    sharper = Temperature(temperature, schedule=Schedule(steps=(None, float(until))))
    return [sharper, Reweight(weights, schedule=Schedule(steps=(None, float(weights_until))))]


def one_entity(logits: Tensor, entities: list[tuple[int, ...]]) -> Tensor:
    """Text tokens that each pixel may see: those of its most probable entity, and all that are of none.

    Args:
        logits: of cross-attention, `[…, tokens]`.
        entities: token numbers of each entity.

    Returns:
        bool of the shape of logits.
    """
    scores = torch.stack([logits[..., list(tokens)].logsumexp(-1) for tokens in entities], -1)
    best = scores.argmax(-1)
    visible = torch.ones_like(logits, dtype=torch.bool)
    for number, tokens in enumerate(entities):
        for token in tokens:
            visible[..., token] = best == number
    return visible
