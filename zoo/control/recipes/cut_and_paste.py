"""After the idea of Cut-and-Paste: a subject of a reference image in a video whose background stays."""

from typing import Any

from ..registry import recipe
from ..swapping import blend_words, swap_words


@recipe(
    "After the idea of Cut-and-Paste",
    "arXiv:2311.11697",
    "idea",
    hosts="UNets, frames as rows, with an image prompt",
    needs="two prompts, a reference image; callback",
    cost="one row more",
    missing="formula, model and layers",
)
def cut_and_paste(
    source: str, target: str, word: str, *, tokenizer: Any, steps: int, scale: int = 4, **options: Any
) -> list:
    """Edits for a Control with branches=("source", "target"): Prompt-to-Prompt and a blend by the subject's word.

    Args:
        source, target, tokenizer, steps, options: see `swapping.swap_words`.
        word: of the Control, the subject in both prompts.
        scale: latent pixels per token of the observed attentions.
    """
    edits = swap_words(source, target, tokenizer=tokenizer, steps=steps, **options)
    return [*edits, *blend_words([word], [word], steps=steps, scale=scale)]
