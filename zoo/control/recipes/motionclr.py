"""MotionCLR: motions emphasized, erased, replaced, shifted and styled through their attention."""

import torch
from torch import Tensor

from ...sites import Schedule
from ..edits import Emphasize, Reweight, Share
from ..registry import recipe
from ..where import Where


@recipe(
    "MotionCLR",
    "IDEA-Research/MotionCLR@a6f44a7",
    "exact",
    hosts="text-conditioned transformers over time",
    needs="nothing",
    cost="none",
    recorded="unet_motionclr",
)
def motionclr(
    word: str | None = None, *, emphasize: float = 0.0, erase: float = 1.0, replace_steps: int = 0, style_steps: int = 0
) -> list:
    """Edits for a Control with branches=("source", "target").

    Args:
        word: of the Control; two tokens by the authors.
        emphasize: added to the word's column of the map.
        erase: factor on the word's column, 0.1 by the authors; 1 is neutral.
        replace_steps: first steps in which self-attention maps are the source's, 3 by the authors.
        style_steps: first steps with the source's queries, 5 by the authors.
    """
    edits: list = []
    if word is not None:
        edits.append(Reweight({word: erase}, branch="target"))
        edits.append(Emphasize(word, emphasize, branch="target"))
    where = Where(kinds=("self", "joint"))
    for what, steps in (("qk", replace_steps), ("q", style_steps)):
        if steps:
            edits.append(Share(what, where=where, schedule=Schedule(steps=(None, steps))))
    return edits


def shift(x: Tensor, ratio: float = 0.5) -> Tensor:
    """Queries, keys or values `[B, frames, heads, d]` of a motion, parts exchanged: the last frames come first.

    Args:
        x: see above.
        ratio: share of the frames that goes to the end.
    """
    first = int(x.shape[1] * ratio)
    return torch.cat([x[:, first:], x[:, :first]], 1)
