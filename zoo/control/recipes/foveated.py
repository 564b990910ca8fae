"""Foveated diffusion: fine tokens where one looks, one token for each block elsewhere (CRPA)."""

import torch
from torch import Tensor

from ..edits import Foveation, foveate, mixed_attention
from ..registry import recipe


def circle(size: tuple[int, int], center: tuple[float, float] = (0.0, 0.0), radius: float = 0.3) -> Tensor:
    """Mask of a fovea, bool `[rows, columns]`: center off the middle in sizes, radius in half diagonals."""
    height, width = size
    y = torch.arange(height) + 0.5 - height * (0.5 + center[0])
    x = torch.arange(width) + 0.5 - width * (0.5 + center[1])
    reach = radius * 0.5 * (height**2 + width**2) ** 0.5
    return y[:, None] ** 2 + x**2 <= reach**2


@recipe(
    "Foveated diffusion",
    "arXiv:2603.23491",
    "exact",
    hosts="FLUX.2, Wan, with LoRA",
    needs="a LoRA trained on packed tokens",
    cost="fine tokens + blocks, squared, instead of all tokens, squared",
    recorded="dit_crpa",
)
def foveated(fovea: Tensor, *, factor: int = 2) -> tuple[Foveation, object]:
    """The packing of tokens, and the attention of packed tokens behind text (`edits.mixed_attention`).

    Args:
        fovea: mask on the tokens, bool `[rows, columns]`, see `circle`.
        factor: rows and columns of a block, 2 or 4.
    """
    return foveate(fovea, factor), mixed_attention
