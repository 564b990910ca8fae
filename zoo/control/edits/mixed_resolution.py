"""Fine tokens where one looks, coarse ones elsewhere, and their attention (foveated diffusion)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Foveation:
    """Packed tokens of two resolutions: `factor` x `factor` fine tokens of a block that the fovea touches, else one.

    Attributes:
        tokens: number of the token of the full grid that each packed token stands for, the top-left of its block for
            coarse ones, int64 `[packed]`.
        coarse: which packed tokens are coarse, bool `[packed]`.
        first: which packed tokens are the top-left of a fine block, bool `[packed]`.
        grid: rows and columns of the full grid.
        factor: rows and columns of a block.
    """

    tokens: Tensor
    coarse: Tensor
    first: Tensor
    grid: tuple[int, int]
    factor: int

    def pack(self, x: Tensor) -> Tensor:
        """`[B, grid tokens, C]` to `[B, packed, C]`; coarse tokens are the top-left of their block."""
        return x[:, self.tokens]

    def unpack(self, x: Tensor) -> Tensor:
        """`[B, packed, C]` to `[B, grid tokens, C]`; a coarse token fills its block."""
        height, width = self.grid
        rows, columns = torch.arange(height), torch.arange(width)
        block = (rows - rows % self.factor)[:, None] * width + (columns - columns % self.factor)
        index = torch.full((height * width,), -1)
        index[self.tokens[~self.coarse]] = (~self.coarse).nonzero()[:, 0]
        corner = torch.full((height * width,), -1)
        corner[self.tokens[self.coarse]] = self.coarse.nonzero()[:, 0]
        index = torch.where(index < 0, corner[block.flatten()], index)
        return x[:, index.to(x.device)]

    def ids(self) -> Tensor:
        """Row and column of each packed token on the full grid, int64 `[packed, 2]`."""
        return torch.stack([self.tokens // self.grid[1], self.tokens % self.grid[1]], 1)


def foveate(fovea: Tensor, factor: int) -> Foveation:
    """Packs a grid, blocks in raster order, the tokens of a fine block in raster order.

    Args:
        fovea: bool `[rows, columns]`.
        factor: rows and columns of a block.

    Raises:
        ValueError: a grid that is no multiple of the factor.
    """
    height, width = fovea.shape
    if height % factor or width % factor:
        raise ValueError(f"fovea of {height} x {width} tokens must be a multiple of factor={factor}")
    number = torch.arange(height * width).reshape(height // factor, factor, width // factor, factor).transpose(1, 2)
    fine = fovea.reshape(height // factor, factor, width // factor, factor).transpose(1, 2).flatten(2).any(-1)
    number = number.flatten(2)
    keep = fine[..., None].expand_as(number).clone()
    keep[..., 0] = True  # the top-left stands for a coarse block
    coarse = (~fine)[..., None].expand_as(number)
    first = torch.zeros_like(keep)
    first[..., 0] = fine
    return Foveation(number[keep], coarse[keep], first[keep], (height, width), factor)


def mixed_attention(
    query: Tensor, key: Tensor, value: Tensor, foveation: Foveation, rotate: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Attention of packed tokens behind text tokens: two dense calls.

    Fine queries and text see all keys at fine positions. Coarse queries see text, coarse tokens and the top-left token
    of each fine block, at positions divided by the factor, on both sides.

    Args:
        query, key, value: `[B, text + packed, heads, d]` before rotary embeddings.
        foveation: of the packed tokens.
        rotate: `rotate(x, positions)` with positions `[tokens, 2]`, rows and columns; text tokens are at 0.

    Returns:
        `[B, text + packed, heads, d]`.
    """
    text = query.shape[1] - len(foveation.tokens)
    device = query.device
    ids = torch.cat([torch.zeros(text, 2), foveation.ids().double()]).to(device)
    is_text = torch.arange(query.shape[1], device=device) < text
    coarse = torch.cat([torch.zeros(text, dtype=torch.bool), foveation.coarse]).to(device)
    first = torch.cat([torch.zeros(text, dtype=torch.bool), foveation.first]).to(device)

    def attend(queries: Tensor, keys: Tensor, places: Tensor) -> Tensor:
        q, k = rotate(query[:, queries], places[queries]), rotate(key[:, keys], places[keys])
        out = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), value[:, keys].transpose(1, 2))
        return out.transpose(1, 2)

    out = torch.empty_like(value)
    out[:, ~coarse] = attend(~coarse, torch.ones_like(coarse), ids)
    if bool(coarse.any()):
        out[:, coarse] = attend(coarse, is_text | coarse | first, ids / foveation.factor)
    return out
