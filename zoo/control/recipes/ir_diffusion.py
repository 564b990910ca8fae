"""IR-Diffusion: subjects of other images are seen where they shall stand, and not by each other."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..edits import Extend, Visible
from ..registry import recipe
from ..where import Where

ISOLATE = {("image", "image"): "region+background"}


def reposition(features: Tensor, mask: Tensor, box: tuple[int, int, int, int], target: tuple[int, int, int, int]):
    """Features `[B, C, H, W]` times a mask, cropped to a box and put into a target box of zeros, nearest.

    Boxes are (left, top, right, bottom) in tokens.
    """
    (left, top, right, bottom), (x0, y0, x1, y1) = box, target
    crop = (features * mask.to(features))[..., top:bottom, left:right]
    out = torch.zeros_like(features)
    out[..., y0:y1, x0:x1] = interpolate(crop, size=(y1 - y0, x1 - x0))
    return out


@recipe(
    "IR-Diffusion (DreamStory)",
    "hehuiguo/DreamStory@91e1a4b",
    "partial",
    hosts="SDXL",
    needs="images, boxes and masks of the subjects, replayed as branches",
    cost="keys of the subjects' pixels more",
    missing="repositioned keys are those of the layer's features at their own place here; key dropout is left out",
)
def ir_diffusion(subjects: dict[str, Tensor], inside: Tensor, *, layers: tuple[int, ...] | None = None) -> list:
    """Edits for a Control whose branches are the subjects and "target".

    Args:
        subjects: branch → mask of the subject in its own image, `[height, width]`.
        inside: where subjects stand in the target, `[height, width]`; these queries see the subjects.
        layers: with mutual self-attention, the decoder's; all when None.
    """
    names = tuple(subjects)
    where = Where(kinds=("self",), layers=layers)
    return [Extend(names, "target", visible=dict(subjects), inside=inside, where=where)]


def isolation(regions: Tensor, *, layers: tuple[int, ...] | None = None) -> list:
    """Edits by which pixels of one subject do not see those of another, for layers without `ir_diffusion`.

    Args:
        regions: masks of the subjects in the target and of the rest, disjoint, `[regions, height, width]`.
        layers: all when None.
    """
    return [Visible(ISOLATE, regions, where=Where(kinds=("self",), layers=layers), guidance="both")]
