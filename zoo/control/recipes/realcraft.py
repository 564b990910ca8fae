"""After the idea of RealCraft: the words of an object swapped, its shape free, all else as in the source."""

from typing import Any

from torch import Tensor

from ..edits import Share
from ..registry import recipe
from ..swapping import swap_words
from ..where import Where


@recipe(
    "After the idea of RealCraft",
    "arXiv:2312.12635",
    "idea",
    hosts="UNets, frames as rows",
    needs="two prompts, a mask of the object",
    cost="one row more",
    missing="steps, how the object is found, how self-attention is relaxed",
)
def realcraft(source: str, target: str, relaxed: Tensor, *, tokenizer: Any, steps: int, **options: Any) -> list:
    """Edits for a Control with branches=("source", "target").

    Args:
        source, target, tokenizer, steps, options: see `swapping.swap_words`.
        relaxed: mask of the object, `[height, width]`; queries outside take the source's output in self-attention.
    """
    edits = swap_words(source, target, tokenizer=tokenizer, steps=steps, self_attention=0.0, **options)
    keep = ~relaxed.bool()
    return [*edits, Share("out", where_tokens=keep, where=Where(kinds=("self",)), guidance="cond")]
