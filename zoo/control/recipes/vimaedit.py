"""ViMAEdit: Prompt-to-Prompt without inversion, with masks spread by self-attention and noise inside of them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate

from ...sites import Schedule
from ..edits import Blend, RefinedMask, RowGuidance, VirtualInversion, spread
from ..regions import normalize
from ..registry import recipe
from ..swapping import swap_words


def refined_map(maps: Tensor, attend: Callable[[Tensor], Tensor], *, rounds: int = 5, keep: float = 0.5) -> Tensor:
    """Maps `[B, tokens, words]`, words added up, spread by self-attention; `[B, tokens]`."""
    return spread(maps.sum(-1, keepdim=True), attend, rounds=rounds, keep=keep)[..., 0]


def masks(maps: Tensor, size: tuple[int, int], *, threshold: float = 0.5) -> Tensor:
    """Masks of the latents, bool `[rows, 1, *size]`: minimum to maximum in 0..1, nearest, above a threshold."""
    scaled = normalize(maps, "minmax")
    return interpolate(scaled[:, None], size=size) > threshold


@recipe(
    "ViMAEdit",
    "Null-0000/ViMAEdit@8d3ffa2",
    "exact",
    hosts="Stable Diffusion, without the image prompt: a Control refuses IP-Adapters",
    needs="two prompts, latents of the source; callback",
    cost="one attention row more, and five attention calls with one channel in each step",
    recorded="unet_refined_maps",
)
def vimaedit(
    source: str,
    target: str,
    clean: Tensor,
    words: Sequence[str] = (),
    *,
    tokenizer: Any,
    steps: int,
    scale: int = 2,
    eta: float = 1.0,
    guidance: float | None = 1.0,
    thresholds: tuple[float, float] = (0.5, 0.8),
    **options: Any,
) -> list:
    """Edits for a Control of a pipeline with branches=("source", "target"), through `Control.callback`.

    Args:
        source, target: prompts.
        clean: latents of the source image, `[1, C, H, W]`.
        words: of the Control, that differ; without any, no mask is made, and neither blend nor noise.
        tokenizer, steps, options: see `swapping.swap_words`; kind="refine", cross=0.4, self_attention=0.6 by default.
        scale: latent pixels per token of the refined masks, 32 x 32 of 64 x 64 latents.
        eta: share of the noise inside of the mask.
        guidance: scale of the source's row; that of the pipeline when None.
        thresholds: of the blend and of the noise.
    """
    options = {"kind": "refine", "cross": 0.4, "self_attention": 0.6} | options
    edits = swap_words(source, target, tokenizer=tokenizer, steps=steps, **options)
    late = Schedule(steps=(int(0.2 * steps), None))
    mask = None
    if words:
        mask = RefinedMask(*words, scale=scale, cross_scales=(2 * scale,), schedule=late)
        edits += [mask, Blend(mask.above(thresholds[0]), schedule=late)]
    edits.append(VirtualInversion(clean, mask=None if mask is None else mask.above(thresholds[1]), eta=eta))
    return edits if guidance is None else [*edits, RowGuidance({"source": guidance})]


def edited_image_embedding(image: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """`e_image + (t_target - t_source) |e_image| / |t_target - t_source|`, for an IP-Adapter."""
    change = target - source
    length = change.norm(dim=-1, keepdim=True)
    return image + change * image.norm(dim=-1, keepdim=True) / length.masked_fill(length == 0, 1)
