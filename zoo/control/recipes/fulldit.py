"""FullDiT: conditions are tokens that attend and are attended to like all others."""

import torch
from torch import Tensor

from ..registry import recipe


@recipe(
    "FullDiT, conditions as tokens",
    "arXiv:2503.19907",
    "partial",
    hosts="video transformers",
    needs="a model trained so",
    cost="attention over all tokens",
    missing="positions of condition tokens, their timesteps, the order of training",
)
def fulldit(video: Tensor, conditions: dict[str, Tensor | None]) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """One sequence of the video and the conditions that are there, and where each is.

    Args:
        video: `[B, tokens, C]`.
        conditions: name → `[B, tokens, C]`, or None when absent; an absent one leaves no token.
    """
    parts, spans, first = [video], {"video": (0, video.shape[1])}, video.shape[1]
    for name, tokens in conditions.items():
        if tokens is not None:
            parts.append(tokens)
            spans[name] = (first, first + tokens.shape[1])
            first += tokens.shape[1]
    return torch.cat(parts, 1), spans
