"""Seg2Any: words of an entity meet their region, and in later layers regions meet only themselves."""

from collections.abc import Sequence

from torch import Tensor

from ...sites import Schedule
from ..edits import Visible
from ..registry import recipe

BASE = {
    ("text", "text"): "all",
    ("text", "image"): "all",
    ("entity", "entity"): "own",
    ("entity", "image"): "region",
    ("image", "entity"): "region",
    ("image", "text"): "all",
    ("image", "image"): "all",
    ("image", "reference"): "all",
    ("reference", "image"): "all",
    ("reference", "reference"): "all",
    ("padding", "padding"): "own",
}
HARD = BASE | {("image", "text"): "background", ("image", "image"): "region+background"}


@recipe(
    "Seg2Any, masks",
    "arXiv:2506.00596, 0xLDF/Seg2Any@37c679e",
    "exact",
    hosts="FLUX",
    needs="a mask and words for each entity; LoRA weights of the contour stream",
    cost="less than dense: a call for each group of tokens that see the same",
    recorded="dit_seg2any",
)
def seg2any(
    regions: Tensor,
    words: Sequence[str],
    *,
    hard_layers: tuple[int, int] = (19, 38),
    contour_weight: float = 1.0,
    fractional: bool = False,
) -> list:
    """Edits of who sees whom.

    Args:
        regions: masks of the entities, `[entities, height, width]`, or their shares with fractional.
        words: of the Control, of each entity; all other text is global.
        hard_layers: first layer and end, counted over dual and single blocks, where an image token sees its own regions
            alone; equal numbers for none.
        contour_weight: factor on the probabilities of the reference stream.
        fractional: whether a token counts in a region by its share ("place").
    """
    weights = (
        {}
        if contour_weight == 1
        else {pair: contour_weight for pair in (("image", "reference"), ("reference", "image"))}
    )
    options = {"weights": weights, "fractional": fractional}
    edits = [Visible(BASE, regions, words, **options)]
    if hard_layers[0] < hard_layers[1]:
        layers = range(*hard_layers)
        edits.append(Visible(HARD, regions, words, **options, schedule=Schedule(layers=layers)))
    return edits
