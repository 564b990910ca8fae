"""DiTCtrl: the next segment of a video attends to keys and values of the one before."""

import torch
from torch import Tensor

from ...sites import Schedule
from ..edits import Reweight, Share
from ..registry import recipe
from ..where import Where


@recipe(
    "DiTCtrl",
    "TencentARC/DiTCtrl@f1348b5",
    "exact",
    hosts="CogVideoX",
    needs="prompts of segments",
    cost="none in attention; segments are denoised in pairs",
    recorded="dit_ditctrl",
)
def ditctrl(*, steps: int = 50, layers: tuple[int, ...] = (25, 26, 27, 28, 29), first: int = 2, end: int = 25) -> list:
    """Edits for a Control with branches=("source", "target"), the segment before and the next.

    Args:
        steps: of the run; `first` and `end` are of 50 and scale with it.
        layers: that share; the authors' of CogVideoX-2B.
        first, end: steps in which they do.
    """
    first, end = round(first * steps / 50), max(round(end * steps / 50), 1)
    where = Where(kinds=("joint", "self"), layers=layers)
    return [Share("kv", "all", where=where, schedule=Schedule(steps=(first, end)))]


def reweighted(weights: dict[str, float]) -> Reweight:
    """Words of the Control that count more or less, seen from the video and to it, not normalized."""
    return Reweight(weights, both=True, guidance="both")


def overlap_weights(frames: int) -> Tensor:
    """Weights of the clean estimates of a segment's frames, `min(2 (i + .5) / n, 2 - 2 (i + .5) / n)`."""
    place = 2 * (torch.arange(frames, dtype=torch.float64) + 0.5) / frames
    return torch.minimum(place, 2 - place)


def average_segments(estimates: Tensor, overlap: int) -> Tensor:
    """Clean estimates `[segments, frames, …]`, each `overlap` frames over the next, as one video `[total, …]`."""
    segments, frames = estimates.shape[:2]
    weights = overlap_weights(frames).to(estimates)
    stride = frames - overlap
    shape = (stride * (segments - 1) + frames, *estimates.shape[2:])
    total, norm = estimates.new_zeros(shape), estimates.new_zeros(shape[0])
    for i, x in enumerate(estimates):
        total[i * stride : i * stride + frames] += x * weights.reshape(-1, *[1] * (x.dim() - 1))
        norm[i * stride : i * stride + frames] += weights
    return total / norm.reshape(-1, *[1] * (total.dim() - 1))


def split_by_words(
    query: Tensor, key: Tensor, value: Tensor, text: int, edited: Tensor, source: Tensor, scale: float | None = None
) -> Tensor:
    """Rows of the target's foreground see words and the source's foreground, those of its background the rest.

    The masks are those of the conditional rows for both branches of guidance.

    Args:
        query: of the target, `[tokens, heads, d]`, text first.
        key, value: of the source.
        text: number of text tokens, whose rows see all.
        edited, source: foreground of target and source, bool `[tokens - text]`.
        scale: factor on query . key.
    """
    words = torch.ones(text, dtype=torch.bool, device=query.device)
    out = torch.empty_like(query)

    def attend(rows: Tensor, keys: Tensor) -> None:
        parts = (query[rows], key[keys], value[keys])
        q, k, v = (x.transpose(0, 1)[None] for x in parts)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        out[rows] = attended[0].transpose(0, 1)

    nobody = torch.zeros_like(words)
    attend(torch.cat([words, torch.zeros_like(edited)]), torch.cat([words, torch.ones_like(source)]))
    attend(torch.cat([nobody, edited]), torch.cat([words, source]))
    attend(torch.cat([nobody, ~edited]), torch.cat([words, ~source]))
    return out
