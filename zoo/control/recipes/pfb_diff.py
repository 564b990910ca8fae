"""PFB-Diff: block inputs blended with a reference outside of a mask, and words held to their side of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..edits import BlendFeatures, Visible
from ..registry import recipe
from ..where import Where

RULES = {("image", "entity"): "region", ("image", "text"): "all"}


@recipe(
    "PFB-Diff",
    "CMACH508/PFB-Diff@a60a4b8",
    "exact",
    hosts="Stable Diffusion",
    needs="a mask; the source by inversion",
    cost="none",
    recorded="unet_pfb_diff",
)
def pfb_diff(
    mask: Tensor,
    *,
    inside: str | None = None,
    outside: str | None = None,
    blocks: Sequence[str] = ("mid_block", "up_blocks.0"),
    scales: tuple[int, ...] = (2, 4, 8),
) -> list:
    """Edits for a Control with branches=("source", "target").

    Args:
        mask: of the edit, `[height, width]`; all ones and no words is neutral.
        inside, outside: words of the Control that are seen there alone.
        blocks: whose inputs are blended.
        scales: latent pixels per token of the masked cross-attentions.
    """
    edits: list = [BlendFeatures(mask, blocks)]
    words = {inside: mask.float() > 0.5, outside: mask.float() <= 0.5}
    words = {word: region for word, region in words.items() if word is not None}
    if words:
        where = Where(kinds=("cross",), scales=scales)
        edits.append(Visible(RULES, torch.stack(list(words.values())), tuple(words), where=where, guidance="both"))
    return edits
