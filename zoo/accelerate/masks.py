"""Masks of plans by name: those of `foveal.kernels.masks`, and functions of any module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import Parameter, signature
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...kernels.masks import REGISTRY
from ...kernels.ops import BlockMask

BlockMaskOf = Callable[[Tensor, Tensor, tuple[int, ...]], BlockMask]  # of query, key and grid


def mask_names() -> list[str]:
    """Names of the masks that need the grid or queries and keys alone, as a plan has no more."""
    return sorted(name for name, entry in REGISTRY.items() if entry.alone)


def resolve(
    mask: str | Callable[..., BlockMask], options: Mapping[str, Any], budget: float | None
) -> tuple[BlockMaskOf, bool]:
    """The function `(query, key, grid) -> BlockMask` of a plan, and whether it looks at the grid alone.

    Raises:
        ValueError: an unknown name, options or a budget that the mask does not take.
    """
    given = dict(options)
    if isinstance(mask, str) and ":" in mask:
        module, _, name = mask.partition(":")
        mask = getattr(import_module(module), name)
    if isinstance(mask, str):
        if mask not in REGISTRY or not REGISTRY[mask].alone:
            raise ValueError(
                f"mask={mask!r} must be one of {mask_names()}, a function (query, key, grid) -> BlockMask, or "
                '"package.module:name"'
            )
        entry = REGISTRY[mask]
        function = entry.function
        given |= _budget_option(mask, entry.density, budget)
        _check_options(mask, function, given)
        if entry.dynamic:
            return lambda query, key, grid: function(query, key, **given), False
        return lambda query, key, grid: function(grid, **given, device=query.device), True
    function = mask
    if budget is not None and "budget" in signature(function).parameters:
        given["budget"] = budget
    return lambda query, key, grid: function(query, key, grid, **given), False


def _budget_option(name: str, density: str, budget: float | None) -> dict[str, float]:
    if budget is None or budget == 1:
        return {}
    if density == "sparsity":
        return {"sparsity": 1 - budget}
    if density == "ratio" or name == "sparge":  # shares of the blocks
        return {"topk" if name == "sparge" else "ratio": budget}
    raise ValueError(
        f"budget={budget} says nothing to mask {name!r}, whose density follows from {density}: use options"
    )


def _check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    parameters = signature(function).parameters
    if "value" in parameters:
        raise ValueError(f"mask {name!r} makes keys and values of its own, which a plan cannot hold: call it yourself")
    known = [n for n in parameters if n not in ("query", "key", "shape", "device")]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"mask {name!r} has no {unknown}; its options are {known}")
    if missing := [n for n in known if parameters[n].default is Parameter.empty and n not in options]:
        raise ValueError(f"mask {name!r} needs options {missing}; its options are {known}")


def static_mask(mask: BlockMaskOf, grid: tuple[int, ...], heads: int, device: torch.device | None) -> BlockMask:
    """The lists of a mask that looks at the grid alone."""
    nothing = torch.empty(1, *grid, heads, 1, device=device or "cpu")
    return mask(nothing, nothing, grid)


def density(mask: BlockMask, grid: tuple[int, ...]) -> float:
    """Share of the pairs of tokens that a mask keeps, mean of batch and heads, read from its lists."""
    from ...kernels.block_sparse.cost import visible_pairs

    shape = grid if len(mask.query_block) == len(grid) else (prod(grid),)
    lists = mask.kv_num.shape[0] * mask.kv_num.shape[1]
    return visible_pairs(mask, shape, shape, batch=mask.kv_num.shape[0], heads=mask.kv_num.shape[1]) / (
        lists * prod(grid) ** 2
    )
