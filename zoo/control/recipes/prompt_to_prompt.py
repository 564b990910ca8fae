"""Prompt-to-Prompt: the target takes the source's cross-attention word by word, and its early self-attention."""

from collections.abc import Sequence
from typing import Any

from ..registry import recipe
from ..swapping import blend_words, swap_words


@recipe(
    "Prompt-to-Prompt",
    "arXiv:2208.01626, google/prompt-to-prompt@9c472e4",
    "exact",
    hosts="UNets with cross-attention",
    needs="two prompts, one noise; callback for `local_blend`",
    cost="one attention row more for each edited row",
    recorded="unet_p2p_edits",
)
def prompt_to_prompt(source: str, target: str, **options: Any) -> list:
    """Edits for a Control with branches=("source", "target").

    Args:
        source, target: prompts.
        options: tokenizer and steps, and those of `foveal.zoo.control.swapping.swap_words`: kind "replace" or "refine",
            cross=0.8, self_attention=0.4, weights, align.
    """
    return swap_words(source, target, **options)


def local_blend(source: Sequence[str], target: Sequence[str], *, steps: int, **options: Any) -> list:
    """Edits that keep the source's latents outside of words of the Control; see `swapping.blend_words`.

    Args:
        source, target: words of each prompt.
        steps: of the run.
        options: threshold=0.3, scale=4, start=0.2.
    """
    return blend_words(source, target, steps=steps, **options)
