"""PrimeComposer: an object is put into a background by the logits of a composite, and its words stay with it."""

from torch import Tensor

from ...sites import Schedule
from ..edits import Blend, Visible, overwrite_logits
from ..registry import recipe
from ..where import Where

RULES = {("image", "entity"): "region", ("image", "text"): "all"}


@recipe(
    "PrimeComposer",
    "CodeGoat24/PrimeComposer@ff602b2",
    "exact",
    hosts="Stable Diffusion 2.1",
    needs="a segmented object, both images by inversion; callback. The user calls `correlate` in the first steps",
    cost="logits of the object's columns",
)
def primecomposer(word: str, mask: Tensor, box: Tensor, *, until: float = 0.8) -> list:
    """Edits for a Control with branches=("source", "target"), the source being the inverted background.

    The correlation diffuser of the first `tau_a` = 0.4 of the steps is `correlate`.

    Args:
        word: of the Control, the object's words: not seen outside of its mask.
        mask: of the object, `[height, width]`.
        box: of the object, `[height, width]`; outside, latents are the background's.
        until: tau_b, fraction of the steps with the background.
    """
    where = Where(kinds=("cross",))
    schedule = Schedule(steps=(None, float(until)))
    return [Visible(RULES, mask.float()[None], (word,), where=where), Blend(box.float(), schedule=schedule)]


def correlate(query: Tensor, key: Tensor, value: Tensor, index: Tensor, logits: Tensor) -> Tensor:
    """Self-attention whose logits with the object's pixels are the composite's; see `edits.overwrite_logits`."""
    return overwrite_logits(query, key, value, index, logits)
