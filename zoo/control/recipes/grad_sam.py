"""Grad-SAM for latents: a mask of what depends on a word, by gradients."""

from torch import Tensor
from torch.nn.functional import max_pool2d

from ..edits import blend, importance
from ..regions import gaussian_blur, normalize
from ..registry import recipe


@recipe(
    "Grad-SAM latent manipulation",
    "arXiv:2408.16232",
    "partial",
    hosts="Stable Diffusion",
    needs="a reference image, gradients",
    cost="one evaluation with gradients",
    missing="aggregation over layers and heads, kernel sizes, timesteps",
)
def grad_sam(
    output: Tensor,
    columns: Tensor,
    size: tuple[int, int],
    *,
    blur: tuple[int, float] = (5, 1.0),
    dilate: int = 3,
    threshold: float = 0.3,
) -> Tensor:
    """Mask of the latents that depend on a word, bool `[*size]`.

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


def manipulate(clean: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """`m clean + (1 - m) reference`, the reference noised to the same timestep."""
    return blend(clean, reference, mask)
