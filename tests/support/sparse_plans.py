"""Masks of plans for tests, and the pairs of tokens that plans keep, made the plain way."""

from math import prod

import torch
from foveal.kernels.ops import BlockMask


def window_pairs(grid, window):
    """Which keys a query sees, bool `[tokens, tokens]`: the window moved into the grid, axis by axis."""
    pairs = torch.ones(1, 1, dtype=torch.bool)
    for n in grid:
        w = min(window, n)
        first = (torch.arange(n) - w // 2).clamp(0, n - w)
        seen = (torch.arange(n) >= first[:, None]) & (torch.arange(n) < first[:, None] + w)
        pairs = (pairs[:, None, :, None] & seen[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return pairs


def two_blocks(query, key, grid, shift=1):
    """Blocks of two tokens along each axis see themselves and the one `shift` behind, another one for each head."""
    block = (2,) * len(grid)
    count = prod([-(-n // 2) for n in grid])
    own = torch.arange(count, dtype=torch.int32, device=query.device)
    heads = torch.arange(1, query.shape[-2] + 1, dtype=torch.int32, device=query.device)[:, None]
    lists = torch.stack([own.expand(query.shape[-2], -1), (own + shift * heads) % count], dim=-1)
    number = torch.where(lists[..., 0] == lists[..., 1], 1, 2).int()
    return BlockMask(block, block, number[None], lists[None].contiguous())


def block_pairs(grid, heads):
    """The pairs of `two_blocks`, bool `[heads, tokens, tokens]`."""
    places = torch.cartesian_prod(*(torch.arange(n) // 2 for n in grid)).reshape(prod(grid), -1)
    box = torch.zeros(prod(grid), dtype=torch.long)
    for axis, n in enumerate(grid):
        box = box * -(-n // 2) + places[:, axis]
    count = prod([-(-n // 2) for n in grid])
    others = [(box[:, None] + head) % count == box for head in range(1, heads + 1)]
    return torch.stack([(box[:, None] == box) | other for other in others])
