"""Maps of words of any pipeline, in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .control import Control
from .edits import WordMask


def heatmap(
    pipe: Any, prompt: str, words: Sequence[str], *, options: Mapping[str, Any] | None = None, **call: Any
) -> tuple[Any, dict[str, Tensor]]:
    """Runs a pipeline and observes words: one image and a map for each word.

    Args:
        pipe: of diffusers, whose tokenizers are known; see `foveal.zoo.control.words.TOKENIZERS`.
        prompt: text that holds the words.
        words: to observe.
        options: of `edits.WordMask`, such as where=.
        call: arguments of the pipeline.

    Returns:
        image: the first image, or the frames of the first video.
        maps: word → `[height, width]` or `[frames, height, width]`, mean over heads, layers and steps.
    """
    observer = WordMask(*words, **dict(options or {}))
    with Control(pipe, observer, words={word: (prompt, word) for word in words}):
        result = pipe(prompt, **call)
    maps = observer.maps[0].cpu()
    images = getattr(result, "images", None)
    return (result.frames if images is None else images)[0], dict(zip(words, maps, strict=True))
