"""Words of a prompt swapped or refined: edits that several papers are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..sites import Schedule
from .edits import Blend, Reweight, Share, Transfer, WordMask, alignment, gather_map
from .where import Where
from .words import CLIP_TOKENS, cross_times, refinement_map, replacement_map

SELF_SCALES = (4, 8, 16, 32)  # latents / 4 and smaller: 16 x 16 tokens of Stable Diffusion


def swap_words(
    source: str,
    target: str,
    *,
    tokenizer: Any,
    steps: int,
    kind: str = "replace",
    cross: float | tuple[float, float] | Mapping[str, Any] = 0.8,
    self_attention: float | tuple[float, float] = 0.4,
    weights: Mapping[str, float] | None = None,
    align: str = "words",
    length: int = CLIP_TOKENS,
    self_scales: Sequence[int] = SELF_SCALES,
    branches: tuple[str, str] = ("source", "target"),
) -> list:
    """Edits for a Control with branches=("source", "target").

    Args:
        source, target: prompts.
        tokenizer: of both.
        steps: of the run.
        kind: "replace" for swapped words, "refine" for added ones.
        cross, self_attention: end, or first and end, of the steps in which the source's maps are taken, in fractions;
            cross by word with "default_", too.
        weights: word of the Control → factor, on the edited map.
        align: "official" repeats the authors' alignment.
        length: text tokens.
        self_scales: latent pixels per token of the self-attentions that are injected.
        branches: names of source and target.

    Raises:
        ValueError: prompts that do not align, or an unknown kind.
    """
    times = cross_times(tokenizer, (source, target), steps, cross, align=align, length=length)[:, 0]
    if kind == "replace":
        right, alpha = replacement_map(tokenizer, source, target, align=align, length=length), None
    elif kind == "refine":
        mapper, alpha = refinement_map(tokenizer, source, target, length=length)
        right = gather_map(mapper)
    else:
        raise ValueError(f"kind={kind!r} must be 'replace' or 'refine'")
    names = {"source": branches[0], "target": branches[1]}
    edits: list = [Transfer(*alignment(right, alpha, times), **names)]
    if weights:
        edits.append(Reweight(weights, branch=branches[1], where=Where(kinds=("cross",))))
    bounds = (0.0, self_attention) if isinstance(self_attention, float | int) else self_attention
    first, end = (int(bound * steps) for bound in bounds)
    if end > first:
        where = Where(kinds=("self",), scales=tuple(self_scales))
        share = Share("qk", source=branches[0], to=branches[1], where=where, guidance="cond")
        share.schedule = Schedule(steps=(first, end))
        edits.append(share)
    return edits


def blend_words(
    source: Sequence[str],
    target: Sequence[str],
    *,
    steps: int,
    threshold: float = 0.3,
    scale: int = 4,
    start: float = 0.2,
    branches: tuple[str, str] = ("source", "target"),
) -> list:
    """Edits that keep the source's latents outside of words: maps of one scale, from step int(start steps) on.

    Args:
        source, target: words of the Control in each prompt.
        steps: of the run.
        threshold: of maps divided by their maxima, after a maximum over 3 x 3 tokens.
        scale: latent pixels per token of the observed attentions.
        start: fraction of the run.
        branches: names of source and target.
    """
    where = Where(kinds=("cross",), places=("down", "up"), scales=(scale,))
    words = [WordMask(*w, branch=b, where=where) for w, b in zip((source, target), branches, strict=True)]
    blend = Blend(words, source=branches[0], target=branches[1], threshold=threshold)
    blend.schedule = Schedule(steps=(int(start * steps), None))
    return [*words, blend]
