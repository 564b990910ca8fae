"""LOCATEdit: masks that are smooth on the graph of self-attention."""

import torch
from torch import Tensor

from ..edits import smooth_on_graph
from ..latents import Step, virtual_step
from ..registry import recipe

WEIGHT = 15.0  # of the words that differ, on the map


@recipe(
    "LOCATEdit",
    "LOCATEdit/LOCATEdit@bf5510d",
    "exact",
    hosts="Stable Diffusion with an IP-Adapter",
    needs="self-attention maps at 32 x 32",
    cost="a Cholesky factorization of 1024 x 1024 in each step",
)
def locatedit(maps: Tensor, self_map: Tensor, *, slope: float = 4.0, weight: float = 0.5) -> Tensor:
    """Refined maps `[B, tokens]`.

    Args:
        maps: mean cross-attention of the words, `[B, tokens]`, as it is; the official code does not normalize it.
        self_map: mean self-attention, `[B, tokens, tokens]`.
        slope: of the confidence.
        weight: of the Laplacian.
    """
    return smooth_on_graph(maps, self_map, slope=slope, weight=weight)


def step(clean_source: Tensor, sample: Tensor, noise_prediction: Tensor, at: Step, **options) -> Tensor:
    """`latents.virtual_step` with DDPM's coefficients everywhere."""
    return virtual_step(clean_source, sample, noise_prediction, at, gated=False, **options)


def sparse_offset(offset: Tensor, percent: float = 92.0) -> Tensor:
    """An offset of embeddings without its smallest entries: those above the (100 - percent)th percentile stay."""
    size = offset.abs()
    least = torch.quantile(size.double(), (100 - percent) / 100).to(size)
    return torch.where(size > least, offset, 0)
