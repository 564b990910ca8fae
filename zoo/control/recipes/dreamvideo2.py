"""DreamVideo-2: reference attention inside a mask, and a loss that counts it more."""

from torch import Tensor

from ..registry import recipe


@recipe(
    "DreamVideo-2, masked reference attention",
    "arXiv:2410.13830",
    "partial",
    hosts="video UNets and VideoDiT",
    needs="trained reference attention and ControlNet",
    cost="attention to one frame",
    missing="how the output projection starts",
)
def dreamvideo2(hidden: Tensor, read: Tensor, mask: Tensor, *, outside: float = 0.75) -> Tensor:
    """`hidden + (m + outside (1 - m)) read`.

    Args:
        hidden, read: `[B, tokens, C]`, read is the attention to the reference.
        mask: m, `[tokens]` or `[B, tokens]`, in 0..1.
        outside: weight outside of the mask; 1 is without mask.
    """
    weight = mask.to(read) + outside * (1 - mask.to(read))
    return hidden + weight[..., None] * read


def loss_weight(mask: Tensor, inside: float = 2.0) -> Tensor:
    """`inside m + 1 - m`, of the squared error of each latent."""
    return inside * mask + 1 - mask
