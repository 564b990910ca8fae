"""DesignEdit: layers taken apart and put together; the background does not look at what is removed."""

from torch import Tensor

from ...sites import Schedule
from ..edits import Blend, DimKeys, Visible
from ..registry import recipe
from ..where import Where

OUTSIDE = {("image", "image"): "inside"}  # of the region that is left


@recipe(
    "DesignEdit",
    "arXiv:2403.14487, design-edit/DesignEdit@4592a4b",
    "exact",
    hosts="SDXL",
    needs="masks of layers; the source by inversion; callback. Layers are pasted by `latents.paste`",
    cost="less than dense: removed keys are left out",
)
def designedit(mask: Tensor, *, until: float = 0.8, leak: bool = False) -> list:
    """Edits for a Control with branches=("source", "target"): the target is the background without the masked object.

    Layers are pasted by `latents.paste` at the end.

    Args:
        mask: of the object, dilated, `[height, width]`.
        until: fraction of the steps, 40 of 50; also of the blend with the source outside of the mask.
        leak: keys times 1 - mask instead, as the authors do, which leaves masked values their share.
    """
    schedule, where = Schedule(steps=(None, float(until))), Where(kinds=("self",))
    options = {"branch": "target", "where": where, "schedule": schedule}
    owner = DimKeys(mask, **options) if leak else Visible(OUTSIDE, (1 - mask.float())[None], **options)
    return [owner, Blend(mask.float(), schedule=schedule)]
