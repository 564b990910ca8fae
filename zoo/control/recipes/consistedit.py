"""ConsistEdit: vision queries and keys of the source everywhere, then, with its values, outside of the edit."""

from typing import Any

from ...sites import Schedule
from ..edits import Kept, Share, WordMask
from ..registry import recipe
from ..where import Where


@recipe(
    "ConsistEdit",
    "zxYin/ConsistEdit_Code@0b73d6a",
    "exact",
    hosts="SD3, FLUX (single blocks), CogVideoX",
    needs="two prompts, one noise; a mask, or a run for it",
    cost="none",
    recorded="dit_consistedit",
)
def consistedit(edited: Any, *, alpha: float = 1.0, places: tuple[str, ...] | None = None) -> list:
    """Edits for a Control with branches=("source", "target").

    Args:
        edited: mask of the edit on the image, True inside, `[height, width]` or `[frames, height, width]`; or the
            `WordMask` of `consistedit_mask`, after its run.
        alpha: fraction of the steps in which all queries and keys are the source's: 1.0 keeps structure, 0.3 allows
            changes of shape, 0.1 for real images; 0 is none.
        places: parts of the model; ("single",) for FLUX.
    """
    keep = Kept(edited) if isinstance(edited, WordMask) else ~edited.bool()
    where = Where(kinds=("joint",), places=places)
    edits = [Share("v", where_tokens=keep, where=where)]
    if alpha > 0:
        edits.append(Share("qk", where=where, schedule=Schedule(steps=(None, float(alpha)))))
    if alpha < 1:
        later = Schedule(steps=(float(alpha), None))
        edits.append(Share("qk", where_tokens=keep, where=where, schedule=later))
    return edits


def consistedit_mask(*words: str, threshold: float = 0.1) -> WordMask:
    """Observer of the source's run: mean over heads, layers and steps, minimum to maximum in 0..1."""
    return WordMask(*words, threshold=threshold, normalize="minmax", where=Where(kinds=("joint",)))
