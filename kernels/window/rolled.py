"""Window attention on axes whose lengths are symbols, as in an exported graph with dynamic sizes.

Where a length is known, its windows fall into a few runs of equal shape; where it is a symbol, their number and shapes
depend on it. Here every axis is rolled and completed to whole windows by one gather, and a mask hides what a query does
not see: one shape for all windows, at the price of up to a window of spare tokens an axis.
"""

import math
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.symbolic import ceil_div, is_symbol, known, modulo, ravel, unravel
from .call import WindowCall
from .geometry import Axis


def covers(axes: tuple[Axis, ...]) -> bool:
    """Return whether windows of these axes depend on symbols."""
    return any(is_symbol(x) for a in axes for x in (a.length, a.window, a.shift)) and not any(a.halo for a in axes)


class _Places(NamedTuple):
    """Tokens of the windows, t each."""

    token: Tensor  # [windows * t] token of the grid
    side: Tensor  # [windows * t] tokens of a window see each other if their sides are equal
    place: Tensor  # [tokens] where every token of the grid stands among those of the windows


def _places(axes: tuple[Axis, ...], device: torch.device) -> _Places:
    """The places of a grid; windows, and the tokens of one, in C order.

    Everything is computed on flat numbers: a broadcast binds a graph to the axes that are 1 while it is traced.
    """
    lengths, windows = [a.length for a in axes], [a.window for a in axes]
    counts = [ceil_div(a.length, a.window) for a in axes]
    t = prod(windows)
    flat = torch.arange(prod(counts) * t, device=device)
    coordinates, sides = [], []
    window, inside = unravel(flat // t, counts), unravel(modulo(flat, t), windows)
    for axis, j, i in zip(axes, window, inside, strict=True):
        slot = j * axis.window + i
        coordinate = modulo(slot + axis.shift, axis.length)
        coordinates.append(coordinate)
        # what the roll carried round the end, what it did not, and what completes the last window
        sides.append(torch.where(slot < axis.length, (coordinate < axis.shift).long(), 2))
    grid = unravel(torch.arange(prod(lengths), device=device), lengths)
    rolled = [modulo(i - a.shift, a.length) for i, a in zip(grid, axes, strict=True)]
    place = ravel([r // w for r, w in zip(rolled, windows, strict=True)], counts) * t
    place = place + ravel([modulo(r, w) for r, w in zip(rolled, windows, strict=True)], windows)
    return _Places(ravel(coordinates, lengths), ravel(sides, [3] * len(axes)), place)


def attend(query: Tensor, key: Tensor, value: Tensor, call: WindowCall) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp as by `tiled.attend`; an axis shorter than its window is one partial window."""
    axes, scale, bias = call.axes, call.scale, call.bias
    batch, heads, key_heads = query.shape[0], query.shape[-2], key.shape[-2]
    accumulate, device = torch.promote_types(query.dtype, torch.float32), query.device
    places, tokens = _places(axes, device), prod([a.length for a in axes])
    count, t = prod([ceil_div(a.length, a.window) for a in axes]), prod([a.window for a in axes])
    windows = batch * count

    def take(x: Tensor) -> Tensor:  # [windows * key heads, rows, d], head by head
        window, head, slot = unravel(torch.arange(windows * x.shape[-2] * t, device=device), [windows, x.shape[-2], t])
        token = places.token.index_select(0, modulo(window, count) * t + slot)
        rows = (window // count * tokens + token) * x.shape[-2] + head
        rows = x.reshape(-1, x.shape[-1]).index_select(0, rows).to(accumulate)
        return rows.view(windows * key_heads, x.shape[-2] // key_heads * t, x.shape[-1])

    q, k, v = take(query), take(key), take(value)
    hides = not all(known(a.shift == 0) and known(a.length % a.window == 0) for a in axes)
    if hides:
        # A window holds values that a query must not see, and zero times NaN is NaN: the values are made finite, and
        # the keys of those that were not become NaN, which the mask keeps out.
        total = v.sum(-1, keepdim=True)
        k, v = k + (total - total), v.nan_to_num()
    logits = torch.bmm(q * scale, k.mT).view(windows * heads, t, t)
    if bias is not None:
        head = torch.arange(windows * heads, device=device) % heads
        logits = logits + bias.to(accumulate).index_select(0, head)
    if hides:
        window, _, slot = unravel(torch.arange(windows * heads * t, device=device), [windows, heads, t])
        side = places.side.index_select(0, modulo(window, count) * t + slot).view(windows * heads, t)
        logits = torch.where(side[:, :, None] == side[:, None, :], logits, -math.inf)
    out = torch.bmm(logits.softmax(-1).view(windows * key_heads, heads // key_heads * t, t), v)
    lse = logits.logsumexp(-1)
    # From [windows, heads, t] back to the grid.
    entry, token, head = unravel(torch.arange(batch * tokens * heads, device=device), [batch, tokens, heads])
    place = places.place.index_select(0, token)
    back = ((entry * count + place // t) * heads + head) * t + modulo(place, t)
    out = out.view(-1, v.shape[-1]).index_select(0, back).to(query.dtype)
    return out.view(*query.shape[:-1], v.shape[-1]), lse.view(-1).index_select(0, back).view(query.shape[:-1])
