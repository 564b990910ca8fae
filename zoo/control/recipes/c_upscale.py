"""C-Upscale: large images denoised by regions, each with its words and the structure of the small one."""

from torch import Tensor

from ..edits import Contexts
from ..latents import replace_low_band
from ..registry import recipe


@recipe(
    "C-Upscale",
    "arXiv:2505.16976",
    "partial",
    hosts="Stable Diffusion, SDXL, PixArt",
    needs="the small image; prompts of regions",
    cost="one cross-attention for each region's prompt",
    missing="filter and schedule of the structure, score and threshold of the screened words, weights of the composer",
)
def c_upscale(texts: Tensor, masks: Tensor, *, weight: float = 0.5) -> list:
    """Edits that compose the prompts of regions with the global one.

    Args:
        texts: encoded prompts of the regions.
        masks: of the regions.
        weight: of the composition, ours; 0 is neutral.
    """
    return [Contexts(texts, masks, weight)]


def visible_words(maps: Tensor, threshold: float) -> Tensor:
    """Words that a region may see: those whose cropped map has its maximum above a threshold; bool `[words]`.

    Args:
        maps: of the global prompt's words in the region, `[words, height, width]`.
        threshold: ours.
    """
    return maps.amax((-2, -1)) > threshold


def keep_structure(clean: Tensor, small: Tensor, *, share: float = 0.25, weight: float = 1.0) -> Tensor:
    """The clean estimate with the low band of the resized small one, an ideal filter of ours."""
    return replace_low_band(clean, small, share, weight)
