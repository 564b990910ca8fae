"""LOCATEdit: Prompt-to-Prompt without inversion, with masks that are smooth on the graph of self-attention."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...sites import Schedule
from ..edits import Blend, RefinedMask, RowGuidance, VirtualInversion
from ..registry import recipe
from ..swapping import swap_words

WEIGHT = 15.0  # of the words that differ, on the map


@recipe(
    "LOCATEdit",
    "LOCATEdit/LOCATEdit@bf5510d",
    "exact",
    hosts="Stable Diffusion, without the image prompt: a Control refuses IP-Adapters",
    needs="two prompts, latents of the source; maps='allow', callback",
    cost="one attention row more; self-attention maps at 32 x 32 and a Cholesky factorization of 1024² in each step",
    recorded="unet_refined_maps",
)
def locatedit(
    source: str,
    target: str,
    clean: Tensor,
    words: Mapping[str, float] | tuple[str, ...],
    *,
    tokenizer: Any,
    steps: int,
    scale: int = 2,
    guidance: float | None = 1.0,
    slope: float = 4.0,
    weight: float = 0.5,
    **options: Any,
) -> list:
    """Edits for a Control of a pipeline with branches=("source", "target") and maps="allow", by `Control.callback`.

    Args:
        source, target: prompts.
        clean: latents of the source image, `[1, C, H, W]`.
        words: of the Control, that differ, with factors on their maps, `WEIGHT` by default.
        tokenizer, steps, options: see `swapping.swap_words`; kind="refine", cross=0.4, self_attention=0.6 by default.
        scale: latent pixels per token of the graph.
        guidance: scale of the source's row; that of the pipeline when None.
        slope, weight: of the confidence and of the Laplacian.
    """
    weights = dict(words) if isinstance(words, Mapping) else dict.fromkeys(words, WEIGHT)
    options = {"kind": "refine", "cross": 0.4, "self_attention": 0.6, "weights": weights} | options
    late = Schedule(steps=(int(0.2 * steps), None))
    graph = {"method": "graph", "slope": slope, "weight": weight, "schedule": late}
    mask = RefinedMask(*weights, scale=scale, cross_scales=(2 * scale,), **graph)
    virtual = VirtualInversion(clean, mask=mask.above(0.8), gated=False)
    edits = swap_words(source, target, tokenizer=tokenizer, steps=steps, **options)
    edits += [mask, Blend(mask.above(0.2), schedule=late), virtual]
    return edits if guidance is None else [*edits, RowGuidance({"source": guidance})]


def sparse_offset(offset: Tensor, percent: float = 92.0) -> Tensor:
    """An offset of embeddings without its smallest entries: those above the (100 - percent)th percentile stay."""
    size = offset.abs()
    least = torch.quantile(size.double(), (100 - percent) / 100).to(size)
    return torch.where(size > least, offset, 0)
