"""HiP (arXiv:2406.09827): the best ranges of keys are halved until they are blocks."""

import torch
from torch import Tensor

from ..block_sparse.mask import BlockMask
from ..common.calling import without_autocast
from .blocks import check_query_key, most_own, own_or_none, to_mask
from .registry import published

LOGITS = 1 << 24  # of sampled queries that are held at a time


def _halve(first: Tensor, last: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of twice as many ranges the better half, in rising order."""
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : scores.shape[-1] // 2]
    first, last = first.gather(-1, best), last.gather(-1, best)
    first, order = first.sort(dim=-1)
    return first, last.gather(-1, order)


@published(paper="2406.09827", density="tokens")
@torch.no_grad()
def hip(
    query: Tensor,
    key: Tensor,
    *,
    tokens: int = 512,
    query_block: int = 32,
    key_block: int = 2,
    causal: bool = False,
    window: int = 0,
    own: bool = True,
) -> BlockMask:
    """Hierarchically pruned attention: for a block of queries the keys are cut into as many equal ranges as blocks are
    kept; each is halved, halves are scored by their first block, and the best stay, until they are blocks. A score is
    the largest product of every second query of the block with a key of that block.

    The first block stands for a range, so keys should follow each other as their content does, for instance in the
    order of `gilbert_order`.

    Args:
        query, key: `[B, tokens, heads, d]`, `[B, tokens, key_heads, d]`; a grid is flattened.
        tokens: keys that are kept, a multiple of `key_block`.
        query_block, key_block: tokens of a block.
        causal: only keys before the end of the block of queries, less `window`, of queries that are the last of the
            sequence of keys; where these are no more than `tokens`, all of them. What is nearer is left to a causal
            window, as lists cannot order tokens inside a block.
        window: of `causal`, keys.
        own: keep the own blocks besides, unless `causal`.

    Raises:
        ValueError: an argument outside what is accepted.
    """
    if check_query_key(query, key) != 1:
        raise ValueError(f"query.shape={tuple(query.shape)} must be [B, tokens, heads, d]: flatten the grid")
    if min(query_block, key_block) < 1 or tokens < key_block or tokens % key_block or query_block < 2:
        raise ValueError(
            f"tokens={tokens!r} must be a multiple of key_block={key_block!r}, query_block={query_block!r} at least 2"
        )
    queries, keys, heads = query.shape[1], key.shape[1], query.shape[2]
    if causal and queries > keys:
        raise ValueError(f"causal=True needs at least as many keys as queries, got {keys} and {queries}")
    rows, width, total = -(-queries // query_block), tokens // key_block, -(-keys // key_block)
    device, dtype = query.device, torch.promote_types(query.dtype, torch.float32)
    ends = (torch.arange(rows, device=device) + 1) * query_block + keys - queries - window
    reach = ends.clamp(min=0, max=keys) if causal else torch.full((rows,), keys, device=device)
    count = (reach + key_block - 1) // key_block  # blocks of keys that a block of queries chooses from
    flat = key.to(dtype).repeat_interleave(heads // key.shape[2], dim=2).transpose(1, 2)  # [B, heads, keys, d]
    places = torch.arange(rows, device=device)[:, None] * query_block + torch.arange(1, query_block, 2, device=device)
    sampled = query.to(dtype).transpose(1, 2)[:, :, places.clamp(max=queries - 1)]  # [B, heads, rows, samples, d]
    inside, rounds = torch.arange(key_block, device=device), 0
    while (width << rounds) < total:
        rounds += 1
    step = max(1, LOGITS // (flat.shape[0] * heads * 2 * width * key_block * max(places.shape[1], flat.shape[-1])))
    parts = []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        edges = torch.arange(width + 1, device=device) * count[part, None] // width
        first, last = (x.expand(*flat.shape[:2], *x.shape) for x in (edges[:, :-1], edges[:, 1:]))
        for _ in range(rounds):
            middle = first + (last - first) // 2
            first, last = torch.cat([first, middle], dim=-1), torch.cat([middle, last], dim=-1)
            place = first[..., None] * key_block + inside  # [B, heads, rows, ranges, key_block]
            index = place.clamp(max=keys - 1).flatten(2)[..., None].expand(-1, -1, -1, flat.shape[-1])
            found = flat.gather(2, index).unflatten(2, (place.shape[2], -1))
            with without_autocast(device):
                logits = (sampled[:, :, part] @ found.mT).unflatten(-1, place.shape[-2:])
            unseen = (place >= reach[part, None, None])[..., None, :, :]
            scores = logits.masked_fill(unseen, -torch.inf).amax((3, 5)).masked_fill(last <= first, -torch.inf)
            first, last = _halve(first, last, scores)
        number = torch.arange(total, device=device)
        chosen = torch.zeros(*first.shape[:3], total + 1, dtype=torch.bool, device=device)
        chosen = chosen.scatter(-1, torch.where(last > first, first, total), True)[..., :total]
        everything = count[part, None] * key_block <= tokens
        parts.append(torch.where(everything, number < count[part, None], chosen))
    kept = torch.cat(parts, dim=2)
    if not causal and (near := own_or_none(query, key, (query_block,), (key_block,), own)) is not None:
        kept = kept | near
    most = width + (0 if causal else most_own((query_block,), (key_block,)))
    return to_mask(kept, query_block=(query_block,), key_block=(key_block,), most=most)
