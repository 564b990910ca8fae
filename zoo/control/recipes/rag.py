"""RAG: regions attend with words of their own, put together in each attention (regional soft refinement)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..edits import Fuse
from ..registry import recipe


def cells(ratios: str, size: tuple[int, int]) -> Tensor:
    """Masks of a grid of regions, bool `[regions, height, width]`.

    Args:
        ratios: rows by ";", each with its height and the widths of its cells by ",": "0.5,0.5,0.5; 0.5,1" is two cells
            above one. A row with one number is one cell.
        size: rows and columns of tokens.

    Raises:
        ValueError: text that is no such grid.
    """
    try:
        rows = [[float(x) for x in row.split(",")] for row in ratios.split(";")]
    except ValueError:
        raise ValueError(f"ratios={ratios!r} must be numbers by ',' in rows by ';'") from None
    total = sum(row[0] for row in rows)
    masks, top = [], 0.0
    for height, *widths in rows:
        bottom, left = top + height / total, 0.0
        for width in widths or [1.0]:
            right = left + width / sum(widths or [1.0])
            mask = torch.zeros(size, dtype=torch.bool)
            # floors as in the official code, but for rounding of the sums
            edges = [int(n * x + 1e-9) for n, x in zip((*size, *size), (top, left, bottom, right), strict=True)]
            mask[edges[0] : edges[2], edges[1] : edges[3]] = True
            masks.append(mask)
            left = right
        top = bottom
    return torch.stack(masks)


@recipe(
    "RAG, regional soft refinement",
    "NJU-PCALab/RAG-Diffusion@92a26ea",
    "exact",
    hosts="FLUX, SD3, cross-attention",
    needs="a prompt for each region as a branch",
    cost="one row for each region",
    recorded="dit_rag",
)
def rag(regions: Sequence[str], masks: Tensor, *, delta: float = 1.0, base: str = "base") -> list:
    """Edits for a Control whose branches are base and regions, with one prompt and the same latents each.

    Args:
        regions: names of the regions' branches.
        masks: `[regions, height, width]`, see `cells`.
        delta: share of the composed regions; 0 is neutral.
        base: name of the branch that is made.
    """
    return [Fuse(base, regions, masks, delta=delta)]
