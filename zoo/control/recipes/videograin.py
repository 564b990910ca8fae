"""VideoGrain: logits within a region raised, across regions lowered, for self- and cross-attention."""

from collections.abc import Sequence

from torch import Tensor

from ...sites import Schedule
from ..edits import Sharpen
from ..registry import recipe
from ..where import Where


def fade(noise: float) -> float:
    """`((t - 1) / 1000)^5` of a timestep t = 1000 noise."""
    return max((1000 * noise - 1) / 1000, 0.0) ** 5


@recipe(
    "VideoGrain, modulated attention",
    "knightyxp/VideoGrain@ab9e226",
    "exact",
    hosts="UNets and transformers with text",
    needs="masks and words of regions",
    cost="logits once more, by pieces, for their extremes",
    recorded="dit_videograin",
)
def videograin(
    regions: Tensor,
    words: Sequence[str],
    *,
    self_strength: float = 0.3,
    cross_strength: float = 1.0,
    until: float = 0.3,
    parity: bool = False,
) -> list:
    """Edits of the first steps; the largest grid of a UNet is left out, as by the authors.

    Args:
        regions: masks, disjoint, `[regions, height, width]` or `[regions, frames, height, width]`.
        words: of the Control, of each region.
        self_strength, cross_strength: lambda; 0 is neutral.
        until: fraction of the steps.
        parity: see `edits.Sharpen`.
    """
    schedule = Schedule(steps=(None, float(until)))
    options = {"fade": fade, "schedule": schedule, "parity": parity}
    return [
        Sharpen(regions, words, strength=cross_strength, where=Where(kinds=("cross", "joint")), **options),
        Sharpen(regions, strength=self_strength, where=Where(kinds=("self", "joint")), **options),
    ]
