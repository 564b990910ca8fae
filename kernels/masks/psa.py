"""PSA (arXiv:2512.04025): blocks of keys at a resolution that falls with their importance."""

from collections.abc import Mapping
from math import ceil, log
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..block_sparse.mask import BlockMask
from .blocks import check_query_key, cut_into_blocks, own_or_none, to_mask
from .registry import published

ENDS = {1: 0.4, 2: 0.5, 4: 0.6, 8: 0.8}  # of Wan2.1-14B, by mass
LOGITS = 1 << 24  # of sampled tokens that are held at a time


def _sampled(x: Tensor, block: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """The same places of every block, `[B, blocks, heads, samples, d]`, and which of them exist."""
    tokens, exists = cut_into_blocks(x, (block,))
    index = places.expand(x.shape[0], x.shape[-2], places.shape[-1]).transpose(1, 2)  # [B, samples, heads]
    index = index[:, None, :, :, None].expand(-1, tokens.shape[1], -1, -1, x.shape[-1])
    there = exists[:, places]  # [blocks, B or 1, heads or 1, samples]
    return tokens.gather(2, index).transpose(2, 3), there.permute(1, 0, 2, 3)


@torch.no_grad()
def psa_importance(
    query: Tensor,
    key: Tensor,
    *,
    query_block: int = 128,
    key_block: int = 128,
    query_places: Tensor | None = None,
    key_places: Tensor | None = None,
) -> Tensor:
    """Importance of blocks of keys for blocks of queries: the largest probability among sampled tokens, relative to
    that of the query's best sampled key; rows sum to 1.

    Args:
        query, key: `[B, tokens, heads, d]`, `[B, tokens, key_heads, d]`.
        query_block, key_block: tokens of a block.
        query_places, key_places: int64 `[B or 1, heads or 1, samples]`, which tokens of every block are sampled. None:
            every fourth; the official code draws a random quarter for each head.

    Returns:
        `[B, heads, query blocks, key blocks]`, float32, float64 for float64 inputs.
    """
    if check_query_key(query, key) != 1:
        raise ValueError(f"query.shape={tuple(query.shape)} must be [B, tokens, heads, d]: flatten the grid")
    places = []
    for given, block in ((query_places, query_block), (key_places, key_block)):
        every = torch.arange(0, block, 4, device=query.device)[None, None]
        places.append(every if given is None else given)
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = key.repeat_interleave(query.shape[-2] // key.shape[-2], dim=-2)
    queries, query_there = _sampled(query.to(dtype) * query.shape[-1] ** -0.5, query_block, places[0])
    keys, key_there = _sampled(key.to(dtype), key_block, places[1])
    flat = keys.permute(0, 2, 4, 1, 3).flatten(3)  # [B, heads, d, key blocks * samples]
    unseen = ~key_there.transpose(1, 2).flatten(2)[:, :, None]
    hides = key.shape[1] % key_block != 0  # only blocks cut short have samples that are not there
    parts = []
    step = max(1, LOGITS // (flat.shape[0] * flat.shape[1] * flat.shape[3] * queries.shape[3]))
    for start in range(0, queries.shape[1], step):
        some = queries[:, start : start + step].transpose(1, 2)  # [B, heads, blocks, samples, d]
        logits = some.flatten(2, 3) @ flat
        if hides:
            logits = logits.masked_fill(unseen, -torch.inf)
        of_blocks = logits.unflatten(3, (keys.shape[1], -1)).amax(4)  # before exp, which keeps the order
        best = (of_blocks - of_blocks.amax(-1, keepdim=True)).exp().unflatten(2, (some.shape[2], -1))
        there = query_there[:, start : start + step].transpose(1, 2)[..., None]
        parts.append(best.masked_fill(~there, 0).amax(3))
    importance = torch.cat(parts, dim=2)
    return importance / importance.sum(-1, keepdim=True)


@torch.no_grad()
def psa_levels(
    importance: Tensor,
    *,
    ends: Mapping[int, float] = ENDS,
    rule: Literal["topk", "mass"] = "mass",
    block: int = 128,
    tile: int = 32,
    least: float = 0.06,
    always: Tensor | None = None,
) -> Tensor:
    """The level of every block of keys, int64 like `importance`: 1 for all its tokens, 2, 4, 8 for means of so many, 0
    for none.

    Blocks are ranked by importance. A level reaches from the end of the level before to its own end, a share of the
    blocks ("topk") or the block with which the sum passes a share of the importance ("mass"). Its length is rounded up
    to multiples of the blocks that fill a tile of pooled keys, and down at the last block.

    Args:
        importance: `[B, heads, query blocks, key blocks]`, not negative.
        ends: level to share, in rising order of shares.
        block, tile: tokens of a block of keys, and of the pooled keys that a kernel takes at a time.
        least: with "mass", share of the blocks at level 1 at least, and one more.
        always: bool, broadcasts; blocks of level 1 whatever the importance (text, the own block).

    Raises:
        ValueError: an argument outside what is accepted.
    """
    if rule not in ("topk", "mass"):
        raise ValueError(f"rule={rule!r} must be 'topk' or 'mass'")
    if any(level not in (1, 2, 4, 8) or not 0 <= end <= 1 for level, end in ends.items()):
        raise ValueError(f"ends={dict(ends)!r} must map levels 1, 2, 4, 8 to shares in [0, 1]")
    count = importance.shape[-1]
    ranked, order = importance.sort(dim=-1, descending=True, stable=True)
    sums = ranked.cumsum(-1)
    place = torch.arange(count, device=importance.device)
    last = torch.zeros_like(importance[..., :1], dtype=torch.int64)
    levels = torch.zeros_like(order)
    for level, end in sorted(ends.items(), key=lambda entry: entry[1]) if rule == "mass" else ends.items():
        align = ceil(level / (block // tile))
        if rule == "topk":
            stop = torch.full_like(last, min(count, int(count * end)))
        else:
            within = sums / sums[..., -1:] <= end + 1e-6
            reached = within.sum(-1, keepdim=True)
            stop = torch.where(reached > 0, reached + 1, last)
        if align > 1:
            length = -(-(stop - last).clamp(min=0) // align) * align
            stop = (last + length).clamp(max=count)
            stop = torch.where(stop == count, last + (stop - last) // align * align, stop)
        stop = torch.maximum(stop.clamp(max=count), last)
        if level == 1 and rule == "mass":
            stop = stop.clamp(min=min(count, int(count * least) + 1))
        levels = torch.where((place >= last) & (place < stop), level, levels)
        last = stop
    levels = torch.zeros_like(order).scatter(-1, order, levels)
    return levels if always is None else levels.masked_fill(always, 1)


def pyramid(x: Tensor, block: int, levels: tuple[int, ...] = (1, 2, 4, 8)) -> Tensor:
    """Tokens and the means of 2, 4, 8 of them one after the other, `[B, tokens, heads, d]` to `[B, all, heads, d]`.

    Each level is as long as whole blocks of `block` tokens make it. Differentiable.
    """
    x = pad(x, [0, 0, 0, 0, 0, -x.shape[1] % block])
    return torch.cat([x if level == 1 else x.unflatten(1, (-1, level)).mean(2) for level in levels], dim=1)


def pyramid_mask(levels: Tensor, tokens: int, *, query_block: int, key_block: int) -> BlockMask:
    """The mask of `psa_levels` over the keys of `pyramid`, with the logarithm of its level as the bias of a block.

    A short last block is taken at level 1 wherever it is taken: a mean over fewer tokens would weigh too much.

    Args:
        levels: int64 `[B, heads, query blocks, key blocks]`.
        tokens: of the keys, before `pyramid`.
        query_block, key_block: tokens of a block, `key_block` a multiple of 8.
    """
    short = (torch.arange(levels.shape[-1], device=levels.device) + 1) * key_block > tokens
    levels = torch.where(short & (levels > 1), 1, levels)
    tile = key_block // 8
    kept, bias = [], []
    for level in (1, 2, 4, 8):
        entries = (levels == level).repeat_interleave(8 // level, dim=-1)
        kept.append(entries)
        bias.append(torch.full(entries.shape[-1:], log(level), device=levels.device))
    mask = to_mask(torch.cat(kept, -1), query_block=(query_block,), key_block=(tile,))
    first = torch.arange(len(bias[0]), device=levels.device) * tile
    lengths = torch.full((sum(map(len, bias)),), tile, dtype=torch.int32, device=levels.device)
    lengths[: len(bias[0])] = (tokens - first).clamp(0, tile).to(torch.int32)
    return mask._replace(bias=torch.cat(bias)[mask.kv_idx.long()], kv_len=lengths)


def psa_lists(
    query: Tensor,
    key: Tensor,
    *,
    ends: Mapping[int, float] = ENDS,
    rule: Literal["topk", "mass"] = "mass",
    query_block: int = 128,
    key_block: int = 128,
    tile: int = 32,
    text: int = 0,
    own: bool = True,
) -> BlockMask:
    """The mask of `psa` over keys and values that `pyramid(…, key_block)` makes; arguments as of `psa`."""
    ends = {int(level): end for level, end in ends.items()}  # files have strings
    if key_block % 8 or key_block < tile:
        raise ValueError(f"key_block={key_block!r} must be a multiple of 8 and no less than tile={tile!r}")
    importance = psa_importance(query, key, query_block=query_block, key_block=key_block)
    always = torch.arange(importance.shape[-1], device=query.device) * key_block + key_block > key.shape[1] - text
    always = always & (text > 0)
    if (near := own_or_none(query, key, (query_block,), (key_block,), own)) is not None:
        always = always | near
    levels = psa_levels(importance, ends=ends, rule=rule, block=key_block, tile=tile, always=always)
    return pyramid_mask(levels, key.shape[1], query_block=query_block, key_block=key_block)


def _pyramid(x: Tensor, *, key_block: int = 128, **_: Any) -> Tensor:
    return pyramid(x, key_block)


@published(paper="2512.04025", density="ends", lists=psa_lists, tokens=_pyramid)
def psa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    ends: Mapping[int, float] = ENDS,
    rule: Literal["topk", "mass"] = "mass",
    query_block: int = 128,
    key_block: int = 128,
    tile: int = 32,
    text: int = 0,
    own: bool = True,
) -> tuple[BlockMask, Tensor, Tensor]:
    """Pyramid sparse attention: of every block of keys its tokens, means of 2, 4 or 8, or nothing, by `psa_importance`
    and `psa_levels`; a mean of n counts as n keys.

    Args:
        query, key, value: `[B, tokens, heads, d]`; a grid is flattened, best in the order of a Gilbert curve.
        ends, rule, tile: see `psa_levels`.
        query_block, key_block: tokens of a block, `key_block` a multiple of 8.
        text: tokens at the end of the sequence whose blocks stay whole.
        own: take the own block whole.

    Returns:
        The mask, keys and values, for `block_sparse_attention(query, keys, values, mask=mask)`.

    Raises:
        ValueError: an argument outside what is accepted.
    """
    blocks = {"query_block": query_block, "key_block": key_block}
    mask = psa_lists(query, key, ends=ends, rule=rule, **blocks, tile=tile, text=text, own=own)
    return mask, pyramid(key, key_block), pyramid(value, key_block)
