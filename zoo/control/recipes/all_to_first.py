"""Puppet-Master: frames attend to the first frame."""

from ..edits import FirstFrame
from ..registry import recipe


@recipe(
    "Puppet-Master, all-to-first attention",
    "RuiningLi/puppet-master@c88efd3",
    "exact",
    hosts="video transformers; UNets with frames in the batch",
    needs="a model trained so",
    cost="1 / frames of self-attention",
    recorded="dit_all_to_first",
)
def all_to_first(frames: int | None = None) -> list:
    """Edits of spatial self-attention.

    Args:
        frames: in the batch of a UNet; None where a sequence holds the video.
    """
    return [FirstFrame(frames)]
