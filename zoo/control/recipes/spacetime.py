"""SpaceTime attention: objects at their places read texts of their own, more early than late."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..edits import Contexts
from ..registry import recipe


def discs(centers: Sequence[tuple[float, float]], size: tuple[int, int], radius: float = 0.2) -> Tensor:
    """Masks of discs, bool `[objects, height, width]`: centers (x, y) and radius in fractions of the image."""
    y, x = ((torch.arange(n) + 0.5) / n for n in size)
    masks = [(y[:, None] - cy) ** 2 + (x - cx) ** 2 <= radius**2 for cx, cy in centers]
    return torch.stack(masks)


@recipe(
    "SpaceTime attention",
    "UCSB-NLP-Chang/Diffusion-SpaceTime-Attn@7641998",
    "exact",
    hosts="Stable Diffusion",
    needs="encoded texts and centers of objects, guidance in one batch; the weights' optimization is the user's",
    cost="one cross-attention for each object",
)
def spacetime(
    texts: Tensor,
    centers: Sequence[tuple[float, float]],
    *,
    weights: float | Tensor | Callable[[int], Tensor] | None = None,
    radius: float = 0.2,
    size: tuple[int, int] = (64, 64),
) -> list:
    """Edits `out_cond + sum_i m_i λ_i (attention to text_i - out_uncond)`.

    Args:
        texts: encoded, `[objects, tokens, channels]`.
        centers: (x, y) of each object in fractions.
        weights: λ; 5 / objects, where the authors start to optimize it, when None. 0 is neutral.
        radius: of the discs.
        size: at which they are drawn.
    """
    weights = 5 / len(texts) if weights is None else weights
    return [Contexts(texts, discs(centers, size, radius), weights, base="uncond")]
