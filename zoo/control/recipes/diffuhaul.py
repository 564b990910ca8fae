"""After the idea of DiffUHaul: early outputs of self-attention between source and target, later the target's own."""

from ...sites import Schedule
from ..edits import Share
from ..registry import recipe
from ..where import Where


@recipe(
    "After the idea of DiffUHaul",
    "omriav/diffuhaul",
    "idea",
    hosts="UNets",
    needs="two branches",
    cost="none",
    missing="weights, step borders, layers, and the model it stands on",
)
def diffuhaul(*, mix: float = 0.5, until: float = 0.4) -> list:
    """Edits for a Control with branches=("source", "target").

    Args:
        mix: of the source's outputs, ours; 0 is neutral.
        until: fraction of the steps, ours.
    """
    schedule = Schedule(steps=(None, float(until)))
    return [Share("out", mix=mix, where=Where(kinds=("self",)), schedule=schedule)]
