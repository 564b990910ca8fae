"""GRAG: how strongly an edit follows its reference image, by keys around their mean."""

from ..edits import KeyMean
from ..registry import recipe


@recipe(
    "GRAG",
    "little-misfit/GRAG-Image-Editing@d0ab2e9",
    "exact",
    hosts="Qwen-Image-Edit; any model with a reference stream",
    needs="a reference image",
    cost="a mean over keys",
    recorded="dit_grag",
)
def grag(*, scale: float = 1.0, delta: float = 1.1, text: tuple[float, float] = (1.0, 1.0)) -> list:
    """Edits of the reference's keys in all layers, steps and rows.

    Args:
        scale: of the mean of the reference's keys.
        delta: of their difference to the mean; the authors recommend 0.8 to 1.7.
        text: both for the text tokens.
    """
    return [KeyMean("reference", scale, delta), KeyMean("text", *text)]
