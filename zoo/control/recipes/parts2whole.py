"""Parts2Whole: self-attention that also sees parts of reference images."""

from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from ..edits import Extend
from ..registry import recipe
from ..where import Where


def bank_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mask of a part on the tokens of a layer, nearest, dilated by 3 x 3; bool `[*grid]`."""
    small = interpolate(mask.float()[None, None], size=grid)
    return max_pool2d(small, 3, stride=1, padding=1)[0, 0] > 0


@recipe(
    "Parts2Whole, shared self-attention",
    "huanngzh/Parts2Whole@e217655",
    "partial",
    hosts="Stable Diffusion with a reference UNet",
    needs="a trained reference UNet",
    cost="keys of the parts more",
    missing="nothing; the reference UNet is left out, references are branches of the one UNet here",
)
def parts2whole(parts: dict[str, Tensor]) -> list:
    """Edits for a Control whose branches are the parts and "target"; conditional rows alone.

    Args:
        parts: branch → mask of the part, `[height, width]`. Keys outside are left out, where the authors leave zeros
            that take a share; masks without a pixel leave the branch out.
    """
    return [Extend(tuple(parts), "target", visible=dict(parts), where=Where(kinds=("self",)))]
