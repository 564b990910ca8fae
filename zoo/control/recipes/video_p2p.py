"""Video-P2P: Prompt-to-Prompt on frames, which all attend to the first."""

from typing import Any

from ..edits import FirstFrame
from ..registry import recipe
from ..swapping import swap_words

SCALES = (2, 4, 8, 16, 32)  # 32 x 32 tokens of Stable Diffusion and smaller


@recipe(
    "Video-P2P",
    "dvlab-research/Video-P2P@ecd7f91",
    "exact",
    hosts="image UNets with frames in the batch",
    needs="one-shot tuning and null-text inversion by the user",
    cost="keys of one frame in self-attention",
)
def video_p2p(
    source: str,
    target: str,
    *,
    tokenizer: Any,
    steps: int,
    frames: int,
    cross: Any = 0.2,
    self_attention: float = 0.5,
    **options: Any,
) -> list:
    """Edits for a Control with branches=("source", "target") and the frames of each prompt side by side in the batch.

    Args:
        source, target, tokenizer, steps, cross, self_attention, options: see `swapping.swap_words`.
        frames: of the video.
    """
    options = {"self_scales": SCALES} | options
    edits = swap_words(
        source, target, tokenizer=tokenizer, steps=steps, cross=cross, self_attention=self_attention, **options
    )
    return [FirstFrame(frames), *edits]
