"""Break-A-Scene: several concepts learned from one image, each held to its mask."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..registry import recipe

WEIGHT = 1e-2


@recipe(
    "Break-A-Scene, losses",
    "google/break-a-scene@b142cf2",
    "exact",
    hosts="Stable Diffusion, in training",
    needs="one image with masks",
    cost="columns of the handles",
)
def break_a_scene(maps: Tensor, masks: Tensor) -> Tensor:
    """Mean square error of each handle's map over its maximum to its mask, added up; times `WEIGHT` in training.

    Args:
        maps: of the handles, mean of heads and layers, `[handles, height, width]`.
        masks: of the handles, any size.
    """
    target = interpolate(masks.float()[:, None], size=maps.shape[-2:])[:, 0]
    highest = maps.amax((-2, -1), keepdim=True)
    scaled = maps / highest.masked_fill(highest == 0, 1)
    return (scaled - target).square().mean((-2, -1)).sum()


def masked_denoising(prediction: Tensor, target: Tensor, masks: Tensor) -> Tensor:
    """Mean square error of prediction and target times the union of masks `[handles, height, width]`."""
    union = interpolate(masks.float().amax(0)[None, None], size=prediction.shape[-2:])
    return (union * prediction - union * target).square().mean()


def some_handles(count: int, generator: torch.Generator) -> list[int]:
    """A random subset of handles, not empty (union sampling)."""
    size = int(torch.randint(1, count + 1, (), generator=generator))
    return sorted(torch.randperm(count, generator=generator)[:size].tolist())
