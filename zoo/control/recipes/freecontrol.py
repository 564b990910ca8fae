"""FreeControl, one step: structure by the queries of one evaluation of a reference."""

from torch import Tensor

from ..edits import Keep, Recall
from ..registry import recipe
from ..where import Where

TIMESTEP = 661  # of the reference's evaluation, whatever sigma


@recipe(
    "FreeControl, one step",
    "arXiv:2511.05219",
    "partial",
    hosts="FLUX.1-dev: the last 25 single blocks",
    needs="a reference image, encoded",
    cost="one evaluation; the bank of queries",
    missing="the equation of the reference's input (scaled without noise here)",
)
def freecontrol(layers: tuple[int, ...] | None = None, places: tuple[str, ...] | None = ("single",)) -> tuple:
    """An edit that keeps queries of the image, for the reference's evaluation, and one that recalls them.

    Args:
        layers: of the model; all of the places when None.
        places: parts of the model.
    """
    keep = Keep("q", where=Where(kinds=("self", "joint"), layers=layers, places=places))
    return keep, Recall(keep)


def reference_input(clean: Tensor, sigma: float = 0.35) -> Tensor:
    """`(1 - sigma) x0`, without noise.

    Raises:
        ValueError: sigma outside of 0.25..0.5, the authors' range.
    """
    if not 0.25 <= sigma <= 0.5:
        raise ValueError(f"sigma={sigma} must be in 0.25..0.5")
    return (1 - sigma) * clean
