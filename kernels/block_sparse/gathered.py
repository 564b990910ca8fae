"""Block-sparse attention as one gather and two products: the graph that is exported.

A graph cannot look at its lists nor choose chunks by lengths, which may be symbols. Every block of queries gathers the
tokens of all blocks that it may list, so that keys and values take (entries of a list / blocks of keys) times their
memory, times the blocks of queries. Everything is computed on flat numbers: a broadcast or a reshape binds a graph to
the axes that are 1 while it is traced.
"""

import math
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..common.symbolic import ceil_div, known, modulo, ravel, unravel
from .call import BlockSparseCall
from .mask import boxes, by_entry
from .skip import margins


def _tokens(box: Tensor, place: Tensor, shape: Sequence[int], block: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Tokens of the grid at these places of these blocks, and which of them exist; None if all do."""
    inside, outside = [], None
    starts, places = unravel(box, boxes(shape, block)), unravel(place, block)
    for start, step, n, b in zip(starts, places, shape, block, strict=True):
        coordinate = start * b + step
        if not known(ceil_div(n, b) * b == n):
            exists = coordinate < n
            outside = exists if outside is None else outside & exists
            coordinate = coordinate.clamp(max=n - 1)
        inside.append(coordinate)
    return ravel(inside, shape), outside


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a & b


def _lengths(length: Tensor, entry: Tensor, box: Tensor) -> Tensor:
    """`q_len` or `kv_len` of these blocks of these batch entries."""
    length = by_entry(length)
    return length.flatten().index_select(0, box if length.shape[0] == 1 else entry * length.shape[1] + box)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: BlockSparseCall,
) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, value_dim]` and log-sum-exp `[B, *spatial, heads]`; see `api`."""
    mask, scale = call.mask, call.scale
    additional_keys, additional_values, additional_mask = call.additional
    (batch, *shape, heads, d), (*_, key_heads, width) = query.shape, value.shape
    key_shape, device = key.shape[1:-2], query.device
    # a unit is a block of queries of the heads that share a list and a key head
    lists = key_heads if mask.kv_idx.shape[1] in (1, key_heads) else heads
    group, most, accumulate = heads // lists, mask.kv_idx.shape[-1], torch.promote_types(query.dtype, torch.float32)
    count, t, s = prod(boxes(shape, mask.query_block)), prod(mask.query_block), prod(mask.key_block)
    units, tokens, key_tokens = batch * lists * count, prod(shape), prod(key_shape)

    def numbers(*lengths: int) -> list[Tensor]:
        return unravel(torch.arange(prod(lengths), device=device), lengths)

    def entries(x: Tensor, entry: Tensor, of: Tensor, box: Tensor, place: Tensor | None = None) -> Tensor:
        """Entries of units in `x`, `[B or 1, lists or 1, query boxes]` or a list of `most` longer."""
        at = (entry if x.shape[0] > 1 else 0, of if x.shape[1] > 1 else 0, box)
        flat = (at[0] * x.shape[1] + at[1]) * count + at[2]
        return x.flatten().index_select(0, flat if place is None else flat * most + place)

    entry, of, box, member, place = numbers(batch, lists, count, group, t)
    token, _ = _tokens(box, place, shape, mask.query_block)
    rows = (entry * tokens + token) * heads + of * group + member
    q = query.reshape(-1, d).index_select(0, rows).to(accumulate).view(units, group * t, d)

    entry, of, box, listed, place = numbers(batch, lists, count, most, s)
    counts = listed < entries(mask.kv_num, entry, of, box)
    number = torch.where(counts, entries(mask.kv_idx, entry, of, box, listed), 0).long()
    token, exists = _tokens(number, place, key_shape, mask.key_block)
    if mask.kv_len is not None:
        exists = _both(exists, place < _lengths(mask.kv_len, entry, number))
    visible = counts if exists is None else counts & exists
    rows = (entry * key_tokens + token) * key_heads + of // (lists // key_heads)
    k, v = (x.reshape(-1, x.shape[-1]).index_select(0, rows).to(accumulate) for x in (key, value))
    v = torch.where(visible[:, None], v, 0)  # zero times NaN is NaN
    k, v = k.view(units, most * s, d), v.view(units, most * s, width)
    added = torch.zeros((), dtype=accumulate, device=device)
    if mask.bias is not None:
        added = entries(mask.bias, entry, of, box, listed).to(accumulate)
    added = torch.where(visible, added, -math.inf).view(units, most * s)
    if additional_keys is not None and additional_values is not None:
        extra = additional_keys.shape[1]
        entry, of, _, token = numbers(batch, lists, count, extra)
        rows = (entry * extra + token) * key_heads + of // (lists // key_heads)
        ek, ev = (
            x.reshape(-1, x.shape[-1]).index_select(0, rows).to(accumulate)
            for x in (additional_keys, additional_values)
        )
        to_additional = added.new_zeros(units, extra)
        if additional_mask is not None:
            shown = additional_mask.flatten().index_select(0, entry * extra + token)
            ek, ev = (torch.where(shown[:, None], x, 0) for x in (ek, ev))  # zero times NaN is NaN
            to_additional = torch.where(shown.view(units, extra), to_additional, -math.inf)
        k, v = torch.cat([k, ek.view(units, extra, d)], 1), torch.cat([v, ev.view(units, extra, width)], 1)
        added = torch.cat([added, to_additional], 1)

    logits = torch.bmm(q * scale, k.mT)
    logits = torch.where(added[:, None] == -math.inf, -math.inf, logits + added[:, None])
    if call.skip_threshold is not None:
        entry, of, box, place = numbers(batch, lists, count, t)
        _, exists = _tokens(box, place, shape, mask.query_block)
        if mask.q_len is not None:
            exists = _both(exists, place < _lengths(mask.q_len, entry, box))
        exists = None if exists is None else exists.view(units, 1, t)
        of_block = logits[..., : most * s].reshape(units, group, t, most, s).amax(-1)
        below = margins(of_block, exists) < math.log(call.skip_threshold)  # [units, group, most]
        below = below[:, :, None, :, None].expand(-1, -1, t, -1, s).reshape(units, group * t, most * s)
        main = logits[..., : most * s].masked_fill(below, -math.inf)
        logits = torch.cat([main, logits[..., most * s :]], -1)
    highest = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(accumulate).min)  # where nothing is visible
    weights = (logits - highest).exp()
    total = weights.sum(-1, keepdim=True)
    out, lse = torch.bmm(weights, v) / (total + (total == 0)), total.log() + highest

    entry, token, head = numbers(batch, tokens, heads)  # from [units, group, t] back to the grid
    box, place = _boxes_of(token, shape, mask.query_block)
    back = (((entry * lists + head // group) * count + box) * group + head % group) * t + place
    out, lse = out.view(-1, width).index_select(0, back), lse.view(-1).index_select(0, back)
    if mask.q_len is not None:
        dead = place >= _lengths(mask.q_len, entry, box)
        out, lse = torch.where(dead[:, None], 0, out), torch.where(dead, -math.inf, lse)
    return out.to(query.dtype).view(*query.shape[:-1], width), lse.view(query.shape[:-1])


def _boxes_of(token: Tensor, shape: Sequence[int], block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Boxes of tokens of the grid, and their places inside."""
    coordinates = unravel(token, shape)
    box = ravel([c // b for c, b in zip(coordinates, block, strict=True)], boxes(shape, block))
    return box, ravel([modulo(c, b) for c, b in zip(coordinates, block, strict=True)], block)
