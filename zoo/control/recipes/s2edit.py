"""S²Edit: the token of an identity is held to a mask."""

import torch
from torch import Tensor

from ..edits import Visible
from ..registry import recipe
from ..where import Where

RULES = {("image", "entity"): "region", ("image", "text"): "all"}


@recipe(
    "S²Edit",
    "arXiv:2507.04584",
    "partial",
    hosts="Stable Diffusion",
    needs="a learned identity token, a mask",
    cost="less than dense",
    missing="what is trained, the form and weight of the orthogonality, settings of the edit",
)
def s2edit(identity: str, mask: Tensor) -> list:
    """Edits by which the identity's token is seen inside of the mask alone.

    Args:
        identity: of the Control, the learned token.
        mask: `[height, width]`.
    """
    return [Visible(RULES, mask.float()[None], (identity,), where=Where(kinds=("cross",)), guidance="both")]


def orthogonality(identity: Tensor, attributes: Tensor) -> Tensor:
    """Mean squared cosine of a feature `[C]` and those of attributes `[n, C]`, ours; 0 for orthogonal ones."""
    return torch.nn.functional.cosine_similarity(identity[None], attributes, dim=-1).square().mean()
