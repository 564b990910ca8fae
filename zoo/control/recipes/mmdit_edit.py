"""Prompt editing in MM-DiT: the image's queries and keys of the source for the first steps, and a blend by words."""

from ...sites import Schedule
from ..edits import Blend, Share, WordMask
from ..registry import recipe
from ..where import Where

BLOCKS = {  # of which the words' maps are taken
    "sd3-m": (7, 8, 5, 4, 9),
    "sd3.5-m": (7, 9, 8, 5, 10),
    "sd3.5-l": (18, 21, 20, 24, 16),
    "flux": (18, 17, 12, 14, 11),
}


@recipe(
    "Prompt editing in MM-DiT",
    "arXiv:2508.07519",
    "exact",
    hosts="SD3, SD3.5, FLUX",
    needs="two prompts, one noise; callback where words are blended",
    cost="none in attention; columns of the words where blended",
)
def mmdit_edit(
    *,
    until: float = 0.2,
    words: tuple[str, ...] = (),
    layers: tuple[int, ...] | str | None = None,
    blend_until: float = 0.5,
    threshold: float = 0.3,
) -> list:
    """Edits for a Control with branches=("source", "target").

    Args:
        until: fraction of the steps with the source's queries and keys; at least one step above 0, 0 is neutral.
        words: of the Control, of the edit, in either prompt; without any, nothing is blended.
        layers: of the words' maps, or a key of `BLOCKS`; all when None.
        blend_until: fraction of the steps that are blended.
        threshold: of the maps divided by their maximum, after a Gaussian 7 x 7 with sigma 1.
    """
    edits: list = []
    if until > 0:
        edits.append(Share("qk", "image", schedule=Schedule(steps=(None, float(until)))))
    if words:
        layers = BLOCKS[layers] if isinstance(layers, str) else layers
        where = Where(kinds=("joint",), layers=layers)
        masks = [WordMask(*words, branch=b, where=where, smooth=(7, 1.0), threshold=threshold) for b in _BRANCHES]
        edits += [*masks, Blend(masks, schedule=Schedule(steps=(None, float(blend_until))))]
    return edits


_BRANCHES = ("source", "target")
