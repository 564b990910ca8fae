"""FlexPrefill (arXiv:2502.20766): a few probe queries decide for every head between pooled scores and columns."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..block_sparse.mask import BlockMask
from ..common.calling import PerAxis
from .blocks import block_lengths, block_means, check_query_key, cut_into_blocks, own_or_none, to_mask
from .registry import published
from .select import keep, pair_scores


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Root of the Jensen-Shannon divergence along the last dimension, NaN where a probability is 0, as published."""
    middle = (p + q) / 2
    return (0.5 * (p * (p / middle).log()).sum(-1) + 0.5 * (q * (q / middle).log()).sum(-1)).sqrt()


def _diagonals(x: Tensor) -> Tensor:
    """Sums of `[…, n, m]` along key = query + offset, `[…, m]`: offset 0, the last query's own key, comes last."""
    rows, columns = x.shape[-2:]
    place = torch.arange(columns, device=x.device) - torch.arange(rows, device=x.device).flip(0)[:, None]
    return x.gather(-1, place.clamp(min=0).expand(x.shape)).masked_fill(place < 0, 0).sum(-2)


def _highest(x: Tensor, number: Tensor) -> Tensor:
    """The `number` highest of every row, bool; ties to the lowest index."""
    return x.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1) < number[..., None]


def _cover(x: Tensor, share: float, least: int, told: Tensor) -> Tensor:
    """Blocks that are kept for a share of the mass of single tokens, by the published rule of 128 tokens a block;
    the least where pooled scores have told."""
    number = (x.sort(dim=-1, descending=True).values.cumsum(-1) <= share).sum(-1) + 1
    return (number // 128 + 1).clamp(min=least).masked_fill(told, least)


@published(paper="2502.20766", density="mass")
@torch.no_grad()
def flexprefill(
    query: Tensor,
    key: Tensor,
    *,
    mass: float = 0.9,
    distance: float = 0.1,
    least: int = 1,
    causal: bool = False,
    block: PerAxis[int] = 128,
    own: bool = True,
) -> BlockMask:
    """FlexPrefill's choice for every head. If pooled scores tell the probes' true distribution over blocks to within
    `distance` (the root of the Jensen-Shannon divergence), the pairs of blocks of the highest pooled attention are
    kept, while their sum over all rows stays within `mass` of it. All rows keep the blocks of keys that the probes
    attend to most, and with `causal` the diagonals: of such heads the `least`, of others as many as have `mass`.

    With `causal`, probes are the last block of queries, as published. Without an order a diagonal means nothing and no
    query is the last: probes are as many queries as a block has, evenly spaced over the grid, and every row keeps its
    own block (ours).

    Args:
        query, key: `[B, *spatial, heads, d]`, `[B, *key_spatial, key_heads, d]`; of one grid if causal.
        mass: in [0, 1]. Official: 0.9 to 0.95.
        distance: official 0.1; 0 never takes pooled scores, 1 nearly always.
        least: blocks, and diagonals, of a head by probes. Official: 1024 tokens.
        causal: one axis. Tokens inside the own block are not ordered by lists.
        block: tokens of a block along each axis.
        own: keep the own block besides.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    rank = check_query_key(query, key)
    if causal and (rank != 1 or query.shape[1] != key.shape[1]):
        raise ValueError(f"causal=True needs one axis, the same for queries and keys; query.shape={tuple(query.shape)}")
    if not 0 <= mass <= 1:
        raise ValueError(f"mass={mass!r} must lie in [0, 1]")
    block = block_lengths("block", block, rank)
    dtype, scale = torch.promote_types(query.dtype, torch.float32), query.shape[-1] ** -0.5
    near = own_or_none(query, key, block, block, own)
    flat, size = query.flatten(1, -3), int(torch.Size(block).numel())
    if causal:
        probes = flat[:, -size:]
    else:
        places = torch.linspace(0, flat.shape[1] - 1, min(size, flat.shape[1]), device=query.device)
        probes = flat[:, places.long()]
    means = block_means(key, block)
    tokens, exists = cut_into_blocks(key, block)
    logits = pair_scores(probes, tokens.flatten(1, 2).to(dtype), scale=scale)  # [B, heads, probes, key blocks * tokens]
    logits = logits.masked_fill(~exists.flatten(), -torch.inf)
    if causal:
        first, place = flat.shape[1] - probes.shape[1], torch.arange(logits.shape[-1], device=query.device)
        logits = logits.masked_fill(place > first + place[: probes.shape[1], None], -torch.inf)
    seen = logits.softmax(-1)
    columns = seen.mean(-2)
    by_column = columns.unflatten(-1, exists.shape).sum(-1)  # [B, heads, key blocks]
    pooled = pair_scores(probes.to(dtype).mean(1, keepdim=True), means, scale=scale)[:, :, 0].softmax(-1)
    told = _divergence(pooled, by_column) < distance  # [B, heads]
    count = by_column.shape[-1]
    number = torch.arange(count, device=query.device)
    first_kept = by_column.masked_fill(number == 0, torch.inf)
    kept = _highest(first_kept, _cover(columns, mass, least, told).clamp(max=count))[:, :, None]
    allowed = None
    if causal:
        allowed = number <= number[:, None]
        kept = kept & allowed
        along = _diagonals(seen[..., : flat.shape[1]]) / seen.shape[-2]
        by_diagonal = pad(along, [0, -along.shape[-1] % size]).unflatten(-1, (count, size)).sum(-1)
        by_diagonal = by_diagonal.masked_fill(number == count - 1, torch.inf)
        diagonal = _highest(by_diagonal, _cover(along, mass, least, told).clamp(max=count))
        behind = (number[:, None] - number).clamp(min=0)  # blocks between a query's and a key's
        kept = kept | (diagonal.flip(-1)[..., behind] & allowed)
    scores = pair_scores(block_means(query, block), means, scale=scale)
    weights = (scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)).softmax(-1)
    pairs = keep(weights, rule="mass", mass=mass, mass_crossing=False, scope="head", least=0)
    kept = kept.expand(pairs.shape) | (pairs & told[..., None, None])
    return to_mask(kept if near is None else kept | near, query_block=block, key_block=block)
