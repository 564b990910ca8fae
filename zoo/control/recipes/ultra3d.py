"""Ultra3D: voxels attend within their part."""

import torch
from torch import Tensor

from ..edits import Groups, Members, relate
from ..registry import recipe


@recipe(
    "Ultra3D, part attention",
    "arXiv:2507.17745",
    "partial",
    hosts="sparse-voxel transformers",
    needs="a part for each voxel; a model trained so",
    cost="the sum of the squares of the parts' sizes",
    missing="how many layers stay full",
)
def ultra3d(labels: Tensor) -> Groups:
    """Who sees whom, for `edits.attend_by_groups`.

    Args:
        labels: part of each token, int `[tokens]`.
    """
    members = Members(["image"] * len(labels), torch.zeros(len(labels), 0), labels.cpu().long())
    return relate(members, members, {("image", "image"): "own"})
