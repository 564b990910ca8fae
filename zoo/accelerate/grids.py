"""Sparse attention of tokens on a grid without a model around, for plug-ins of other programs."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...kernels.ops import BlockMask, block_sparse_attention
from .masks import resolve, static_mask
from .plan import Plan, fit_window
from .sparse import WINDOWS


def attend_grid(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, grid: tuple[int, ...], *, scale: float | None = None
) -> Tensor | None:
    """Attention of `[B, tokens, heads, head_dim]` by the window or mask of a plan, None where that is dense.

    Args:
        query, key, value: tokens of the grid in raster order.
        plan: its steps and layers are not looked at.
        grid: tokens along each axis.
        scale: factor on query . key; head_dim ** -0.5 when None.
    """
    if prod(grid) < plan.min_tokens or plan.budget == 1:
        return None
    rank = len(grid)
    if plan.mask is None:
        window = fit_window(plan, grid, None)
        return None if window is None else WINDOWS[rank](query, key, value, **window, scale=scale, grid=grid)
    shape = (prod(grid),) if plan.flat else grid
    query, key, value = (x.unflatten(1, shape) for x in (query, key, value))
    mask, static = resolve(plan.mask, plan.options, plan.budget)
    if static:
        options = tuple(sorted((name, _hashable(x)) for name, x in plan.options.items()))
        lists = _static_lists(str(plan.mask), options, plan.budget, shape, query.shape[-2], query.device)
    else:
        lists = mask(query, key, shape)
    if len(lists.query_block) != len(shape):
        query, key, value = (x.flatten(1, -3) for x in (query, key, value))
    return block_sparse_attention(query, key, value, mask=lists, scale=scale).flatten(1, -3)


def _hashable(value: Any) -> Any:
    return tuple(_hashable(x) for x in value) if isinstance(value, list | tuple) else value


@lru_cache(maxsize=16)
def _static_lists(
    name: str, options: tuple, budget: float | None, shape: tuple[int, ...], heads: int, device: torch.device
) -> BlockMask:
    return static_mask(resolve(name, dict(options), budget)[0], shape, heads, device)
