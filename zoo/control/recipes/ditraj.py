"""DiTraj: a box that moves keeps the spatial positions of one frame; words inside and outside of it."""

import torch
from torch import Tensor

from ..edits import CopySpatialPositions, Visible
from ..registry import recipe
from ..where import Where

CROSS = {("image", "entity"): "region", ("image", "text"): "all"}


@recipe(
    "DiTraj",
    "arXiv:2509.21839",
    "partial",
    hosts="Wan",
    needs="a box for each frame; words of foreground and background",
    cost="none for positions; cross-attention by two groups",
    missing="steps, the rule for boxes of other sizes (linear here), the mask of self-attention",
)
def ditraj(
    tracks: Tensor, *, foreground: str | None = None, background: str | None = None, anchor: int | None = None
) -> list:
    """Edits of positions, and of cross-attention when words are given.

    Args:
        tracks: the box on the grid of tokens, bool `[frames, rows, columns]`.
        foreground, background: of the Control; tokens in the box see the first, the others the second.
        anchor: frame whose positions are taken; the middle one when None.
    """
    edits: list = [CopySpatialPositions(tracks, anchor=anchor)]
    if foreground is not None and background is not None:
        regions = torch.stack([tracks.bool(), ~tracks.bool()])
        words = (foreground, background)
        edits.append(Visible(CROSS, regions, words, where=Where(kinds=("cross",))))
    return edits
