"""BroadWay (ByTheWay): temporal attention with the energy that motion needs."""

from collections.abc import Sequence

from ...sites import Schedule
from ..edits import MotionEnergy
from ..registry import recipe


@recipe(
    "BroadWay / ByTheWay",
    "arXiv:2410.06241, Bujiazi/ByTheWay@1ae7294",
    "exact",
    hosts="AnimateDiff: a `UNetMotionModel`, 16 frames",
    needs="maps='allow'",
    cost="maps of frames x frames for each pixel and head of the last three up blocks, in a fifth of the steps",
    recorded="unet_broadway",
)
def broadway(
    alpha: float = 0.6, beta: float = 1.5, tau: int = 7, *, end: float = 0.2, blocks: Sequence[int] = (1, 2, 3)
) -> list:
    """Edits of the temporal attention of up blocks. Defaults are those for AnimateDiff.

    The authors do not say how maps of other sizes are interpolated over pixels; here linearly.

    Args:
        alpha: share of the way to the maps of the first of the blocks; 0 with beta of at most 1 is neutral.
        beta: least factor on the high band.
        tau: half width of the band; at least 2 tau + 1 frames.
        end: fraction of the run.
        blocks: numbers of the up blocks.
    """
    return [MotionEnergy(alpha, beta, tau, blocks=blocks, schedule=Schedule(steps=(0, end)))]
