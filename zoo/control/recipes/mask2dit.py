"""Mask2DiT: words of a scene meet the video of their scene, the video meets all of itself."""

from collections.abc import Sequence

import torch

from ..edits import Visible
from ..registry import recipe

RULES = {
    ("entity", "entity"): "own",
    ("entity", "image"): "region",
    ("image", "entity"): "region",
    ("image", "image"): "all",
    ("text", "text"): "own",
}


@recipe(
    "Mask2DiT, attention",
    "arXiv:2503.19881, Tianhao-Qi/Mask2DiT@36bbe26",
    "exact",
    hosts="CogVideoX; VideoDiT by segments",
    needs="a prompt for each scene; the authors fine-tune",
    cost="less than dense",
    recorded="dit_mask2dit",
)
def mask2dit(frames: Sequence[int], words: Sequence[str]) -> list:
    """Edits for a video of scenes, whose texts are one prompt after the other.

    Args:
        frames: latent frames of each scene, together those of the video.
        words: name in the Control of all text tokens of each scene.
    """
    scenes = torch.arange(len(frames)).repeat_interleave(torch.tensor(list(frames)))
    regions = (scenes == torch.arange(len(frames))[:, None])[..., None, None].expand(-1, -1, 2, 2)
    return [Visible(RULES, regions, words, guidance="both")]
