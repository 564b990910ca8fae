"""Sparse attention at a site: tokens of the grid by a window or block lists, all other tokens visible to every query.

Queries that are not on the grid (text, images that condition) attend to everything, by the model's own attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.masks import vsa_coarse
from ...kernels.masks.named import BlockMaskOf, attend_lists
from ...kernels.ops import BlockMask, na1d, na2d, na3d
from ..sites import Call, Layout
from ..sites.intercept import Following

WINDOWS = {1: na1d, 2: na2d, 3: na3d}


@dataclass(frozen=True)
class Choice:
    """Sparse attention of one site in one forward.

    Attributes:
        layout: of the tokens.
        grid: tokens along the axes of the site's sequences.
        window: arguments of a neighborhood, or None.
        mask: makes the lists from query and key, or None.
        lists: of a mask that looks at the grid alone.
        flat: see `Plan`.
        tokens: what lists number, of a mask with keys and values of its own.
        gate: weights of the coarse branch of VSA, and its cube; None without.
        skip_threshold: see `Plan`.
    """

    layout: Layout
    grid: tuple[int, ...]
    window: dict[str, Any] | None = None
    mask: BlockMaskOf | None = None
    lists: BlockMask | None = None
    flat: bool = False
    gate: tuple[nn.Linear, Any] | None = None
    skip_threshold: float | None = None
    tokens: Callable[[Tensor], Tensor] | None = None


def attend(call: Call, following: Following) -> Tensor:
    """The operation of a call with the keys that `call.plan`, a `Choice`, lets its queries see."""
    choice: Choice = call.plan
    parts = split(call, choice)
    if parts is None:
        return following(call)
    (first, end), *others = parts
    additional = dict(zip(("additional_keys", "additional_values", "additional_mask"), others, strict=True))
    query, key, value = (x.unflatten(1, choice.grid) for x in on_grid(call, choice))
    if choice.window is not None:
        out = WINDOWS[len(choice.grid)](query, key, value, **choice.window, scale=call.scale, **additional)
    else:
        lists = block_lists(choice, query, key)
        options: dict[str, Any] = dict(scale=call.scale, skip_threshold=choice.skip_threshold, **additional)
        options["tokens"] = choice.tokens
        out = attend_lists(query, key, value, mask=lists, **options)
    out = out.flatten(1, len(choice.grid))
    if choice.gate is not None:
        out = out + _coarse(call, choice, query, key, value, slice(first, end))
    return join(call, following, out, first, end)


def split(call: Call, choice: Choice) -> tuple[tuple[int, int], Tensor | None, Tensor | None, Tensor | None] | None:
    """First query of the grid and end, keys and values of other tokens (None without any), and which of those count.

    None where queries and keys are not those of the grid (segments of a video attend one by one), or a mask hides some
    of its tokens.
    """
    operation = call.operation
    main, tokens = operation.main, prod(choice.grid)
    if call.query.shape[1] < tokens or call.key.shape[1] < tokens:
        return None
    if main is None or (call.mask is not None and not call.site.mask_hides_text_only) or call.causal:
        return None
    queries = choice.layout.spans(call.site, operation.queries, call.query.shape[1])[main]
    first, end = choice.layout.spans(call.site, operation.keys, call.key.shape[1])[main]
    if end - first == call.key.shape[1]:
        return queries, None, None, None
    extra_key, extra_value = (torch.cat([x[:, :first], x[:, end:]], dim=1) for x in (call.key, call.value))
    return queries, extra_key, extra_value, _visible(call, queries[0], first, end)


def _visible(call: Call, row: int, first: int, end: int) -> Tensor | None:
    """Visible keys outside of the grid, bool `[B, keys]`: those of the first query of the grid."""
    if call.mask is None:
        return None
    mask = call.mask[:, 0, row if call.mask.shape[2] > 1 else 0]  # [B or 1, keys]
    mask = torch.cat([mask[:, :first], mask[:, end:]], dim=1)
    mask = mask if mask.dtype == torch.bool else mask > -1  # an additive mask is 0 or a large negative number
    return mask.expand(call.query.shape[0], -1)


def on_grid(call: Call, choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of the tokens of the grid, `[B, tokens, heads, d]`."""
    main, operation = call.operation.main, call.operation
    assert main is not None
    first, end = choice.layout.spans(call.site, operation.queries, call.query.shape[1])[main]
    start, stop = choice.layout.spans(call.site, operation.keys, call.key.shape[1])[main]
    return call.query[:, first:end], call.key[:, start:stop], call.value[:, start:stop]


def block_lists(choice: Choice, query: Tensor, key: Tensor) -> BlockMask:
    """Lists of a choice for query and key `[B, *grid, heads, d]`."""
    if choice.lists is not None:
        return choice.lists
    assert choice.mask is not None
    if choice.flat:
        rank = len(choice.grid)
        return choice.mask(query.flatten(1, rank), key.flatten(1, rank), (prod(choice.grid),))
    return choice.mask(query, key, choice.grid)


def _coarse(call: Call, choice: Choice, query: Tensor, key: Tensor, value: Tensor, tokens: slice) -> Tensor:
    """The coarse branch of VSA, gated per channel by a projection of the site's input."""
    assert choice.gate is not None and call.hidden_states is not None
    projection, block = choice.gate
    coarse = vsa_coarse(query, key, value, block=block, scale=call.scale).flatten(1, len(choice.grid))
    gate = projection(call.hidden_states[:, tokens]).unflatten(-1, coarse.shape[-2:])
    return gate * coarse


def join(call: Call, following: Following, out: Tensor, first: int, end: int) -> Tensor:
    """The output for all queries: those outside of the grid attend to everything."""
    total = call.query.shape[1]
    if end - first == total:
        return out
    mask = call.mask
    if mask is not None and mask.shape[2] > 1:
        mask = torch.cat([mask[:, :, :first], mask[:, :, end:]], dim=2)
    others = replace(call, query=torch.cat([call.query[:, :first], call.query[:, end:]], dim=1), mask=mask)
    rest = following(others)
    return torch.cat([rest[:, :first], out.to(rest.dtype), rest[:, first:]], dim=1)
