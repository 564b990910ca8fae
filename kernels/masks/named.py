"""Masks by name, as configurations state them: those of the registry, and functions of any module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from importlib import import_module
from inspect import Parameter, signature
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..block_sparse.api import block_sparse_attention
from ..block_sparse.cost import visible_pairs
from ..block_sparse.mask import BlockMask
from .registry import REGISTRY

BlockMaskOf = Callable[[Tensor, Tensor, tuple[int, ...]], BlockMask]  # of query, key and grid


def mask_names() -> list[str]:
    """Names of the masks that need the grid or queries and keys alone, as a configuration has no more."""
    return sorted(name for name, entry in REGISTRY.items() if entry.alone)


def resolve(
    mask: str | Callable[..., BlockMask], options: Mapping[str, Any], budget: float | None
) -> tuple[BlockMaskOf, bool]:
    """The function `(query, key, grid) -> BlockMask` of a name, and whether it looks at the grid alone.

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
        function = entry.lists or entry.function
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
    shape = grid if len(mask.query_block) == len(grid) else (prod(grid),)
    lists = mask.kv_num.shape[0] * mask.kv_num.shape[1]
    return visible_pairs(mask, shape, shape, batch=mask.kv_num.shape[0], heads=mask.kv_num.shape[1]) / (
        lists * prod(grid) ** 2
    )


def named_lists(
    query: Tensor,
    key: Tensor,
    mask: str | Callable[..., BlockMask],
    options: Mapping[str, Any],
    budget: float | None = None,
    *,
    flat: bool = False,
) -> BlockMask:
    """Lists of a mask by its name; those that look at the grid alone are kept for the next call.

    Args:
        query, key: `[B, *grid, heads, head_dim]`.
        mask, options, budget: as `resolve` takes them.
        flat: the mask is given the tokens as one sequence in raster order.

    Raises:
        ValueError: see `resolve`.
    """
    if flat:
        query, key = query.flatten(1, -3), key.flatten(1, -3)
    grid = tuple(query.shape[1:-2])
    if isinstance(mask, str) and mask in REGISTRY and not REGISTRY[mask].dynamic:
        pairs = tuple(sorted((name, _hashable(value)) for name, value in options.items()))
        return _static_lists(mask, pairs, budget, grid, query.shape[-2], query.device)  # pyright: ignore[reportCallIssue]
    return resolve(mask, options, budget)[0](query, key, grid)


def listed_tokens(
    mask: str | Callable[..., BlockMask] | None, options: Mapping[str, Any]
) -> Callable[[Tensor], Tensor] | None:
    """The keys or values `[B, tokens, heads, d]` that lists number, from those of the model; None where these are the
    same."""
    entry = REGISTRY.get(mask) if isinstance(mask, str) else None
    return None if entry is None or entry.tokens is None else partial(entry.tokens, **options)


@torch.compiler.disable  # made by loops over the grid, once: a graph would hold all of them
@lru_cache(maxsize=16)
def _static_lists(
    mask: str, options: tuple, budget: float | None, grid: tuple[int, ...], heads: int, device: torch.device
) -> BlockMask:
    with torch.inference_mode(False):  # a later call may need gradients
        return static_mask(resolve(mask, dict(options), budget)[0], grid, heads, device)


def _hashable(value: Any) -> Any:
    return tuple(_hashable(x) for x in value) if isinstance(value, list | tuple) else value


def attend_lists(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: BlockMask,
    tokens: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> Any:
    """`block_sparse_attention` on a grid, by lists of blocks of that grid or of its tokens in raster order.

    Args:
        query, key, value: `[B, *grid, heads, head_dim]`.
        mask: blocks of as many axes as the grid has, or of one.
        tokens: of `listed_tokens`, with blocks of one axis.
        options: of `block_sparse_attention`.

    Returns:
        What `block_sparse_attention` returns, on the grid.
    """
    grid = query.shape[1:-2]
    if len(mask.query_block) == len(grid):
        return block_sparse_attention(query, key, value, mask=mask, **options)
    query, key, value = (x.flatten(1, -3) for x in (query, key, value))
    if tokens is not None:
        key, value = tokens(key), tokens(value)
    out = block_sparse_attention(query, key, value, mask=mask, **options)
    if isinstance(out, tuple):
        return tuple(x.unflatten(1, grid) for x in out)
    return out.unflatten(1, grid)
