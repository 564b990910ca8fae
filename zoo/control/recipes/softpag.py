"""SoftPAG: guidance away from a model whose chosen heads attend to themselves."""

from collections.abc import Collection, Mapping

from ..edits import Perturb
from ..registry import recipe


@recipe(
    "SoftPAG / HeadHunter",
    "arXiv:2506.10978",
    "partial",
    hosts="any",
    needs="one evaluation more",
    cost="one evaluation of the model",
    missing="the authors' heads and scales, and what the identity means in joint layers",
)
def softpag(
    heads: Mapping[int, Collection[int]] | None = None, *, strength: float = 1.0, identity: str = "value"
) -> list:
    """Edits of the perturbed evaluation; combine by `foveal.zoo.video.guidance.guide`.

    Args:
        heads: layer → heads; all when None.
        strength: u, in 0..1; 0 is neutral.
        identity: "value", image tokens become their own value; "self_and_text" as diffusers' processor of SD3.
    """
    return [Perturb(strength, heads, towards=identity)]
