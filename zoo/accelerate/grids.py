"""Sparse attention of tokens on a grid without a model around, for plug-ins of other programs."""

from __future__ import annotations

from math import prod

from torch import Tensor

from ...kernels.masks.named import attend_lists, listed_tokens, named_lists
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
    query, key, value = (x.unflatten(1, grid) for x in (query, key, value))
    lists = named_lists(query, key, plan.mask, plan.options, plan.budget, flat=plan.flat)
    tokens = listed_tokens(plan.mask, plan.options)
    return attend_lists(query, key, value, mask=lists, tokens=tokens, scale=scale).flatten(1, rank)
