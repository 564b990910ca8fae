"""Grad-SAM for latents: what does not depend on a word is taken from a reference image."""

from torch import Tensor
from torch.nn.functional import max_pool2d

from ...sites import Schedule
from ..edits import KeepReference, importance
from ..regions import gaussian_blur, normalize
from ..registry import recipe
from ..where import Where


def dependence_mask(
    output: Tensor,
    columns: Tensor,
    size: tuple[int, int],
    *,
    blur: tuple[int, float] = (5, 1.0),
    dilate: int = 3,
    threshold: float = 0.3,
) -> Tensor:
    """Mask of the tokens that a word decides, bool `[*size]`.

    Args:
        output: clean estimate, in the graph of columns.
        columns: the word's map, `[B, tokens, heads]`.
        size: rows and columns of tokens.
        blur, dilate, threshold: ours.
    """
    found = importance(output, columns).mean((0, 2)).unflatten(0, size)
    smooth = gaussian_blur(found[None], *blur)
    smooth = max_pool2d(smooth[None], dilate, stride=1, padding=dilate // 2)[0, 0]
    return normalize(smooth, "max") > threshold


@recipe(
    "Grad-SAM latent manipulation",
    "arXiv:2408.16232",
    "partial",
    hosts="Stable Diffusion",
    needs="latents of a reference image; callback with prompts",
    cost="one evaluation with gradients in each chosen step",
    missing="aggregation over layers and heads, kernel sizes, timesteps",
)
def grad_sam(
    word: str,
    reference: Tensor,
    *,
    steps: tuple[float, float] = (0.2, 0.6),
    scale: int = 4,
    blur: tuple[int, float] = (5, 1.0),
    dilate: int = 3,
    threshold: float = 0.3,
    seed: int = 0,
) -> list:
    """Edits that update the latents through `Control.callback`: `z <- m z + (1 - m) z_ref`, noised to the timestep.

    Args:
        word: of the Control.
        reference: clean latents, `[1, C, H, W]`.
        steps: fractions of the run in which latents are kept, ours.
        scale: latent pixels per token of the observed attentions.
        blur, dilate, threshold: of the mask, ours; a threshold below 0 is neutral.
        seed: of the reference's noise.
    """
    where = Where(kinds=("cross",), scales=(scale,))

    def mask(output: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
        return dependence_mask(output, columns, size, blur=blur, dilate=dilate, threshold=threshold)

    return [KeepReference(word, reference, mask, where=where, schedule=Schedule(steps=steps), seed=seed)]
