"""Which static mask each head can do with: by the attention mass it keeps, by its influence on a loss, by gates.

Each search returns a `HeadPlan` for one layer and a range of steps; `join` makes one plan of many.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from ..block_sparse import block_sparse_attention
from ..block_sparse.mask import BlockMask, boxes
from ..common.calling import PerAxis, resolve_scale, without_autocast
from .blocks import check_blocks, check_query_key, cut_into_blocks, density, on_device, stack_heads
from .registry import REGISTRY
from .select import HeadChoice, HeadPlan

LOGITS = 1 << 24  # of the influence that are held at a time


def join(plans: Iterable[HeadPlan]) -> HeadPlan:
    """One plan of several; the first choice that holds counts."""
    return HeadPlan(tuple(choice for plan in plans for choice in plan.choices))


def choice_mask(choice: HeadChoice, shape: Sequence[int]) -> BlockMask:
    """The mask of a choice that is not "dense", on the host.

    Raises:
        ValueError: no static mask of that name, or one of several heads.
    """
    entry = REGISTRY.get(choice.mask)
    if entry is None or entry.dynamic:
        static = sorted(name for name, entry in REGISTRY.items() if not entry.dynamic)
        raise ValueError(f"mask={choice.mask!r} must be 'dense' or one of {static}")
    mask = entry.function(shape, **choice.options)
    if mask.kv_idx.shape[1] != 1:
        raise ValueError(
            f"mask={choice.mask!r} with {choice.options} has {mask.kv_idx.shape[1]} heads; a choice needs 1"
        )
    return mask


def plan_mask(
    plan: HeadPlan,
    shape: Sequence[int],
    *,
    layer: int,
    heads: int,
    step: float = 0.0,
    device: torch.device | str | None = None,
) -> BlockMask | None:
    """The mask of all heads of a layer at a share of the steps, None where all are dense.

    Args:
        plan: see `HeadPlan`.
        shape: tokens of the grid along each axis.
        layer, heads: number of the layer, heads of queries.
        step: in [0, 1).
        device: of the lists; the host when None.

    Raises:
        ValueError: masks of a layer that cut the grid into different blocks.
    """
    choices = [plan.choice(layer, head, step) for head in range(heads)]
    distinct: list[HeadChoice] = []
    for choice in choices:
        if choice.mask != "dense" and choice not in distinct:
            distinct.append(choice)
    if not distinct:
        return None
    made = [choice_mask(choice, shape) for choice in distinct]
    cuts = {(x.query_block, x.key_block, x.kv_num.shape[-1]) for x in made}
    if len(cuts) > 1:
        raise ValueError(f"masks of layer {layer} must cut the grid into the same blocks, got {sorted(cuts)}")
    rows, count = made[0].kv_num.shape[-1], _key_blocks(made[0], shape)
    full = torch.arange(count, dtype=torch.int32).expand(1, 1, rows, count)
    dense = made[0]._replace(kv_num=torch.full((1, 1, rows), count, dtype=torch.int32), kv_idx=full)
    return on_device(stack_heads([dense if x.mask == "dense" else made[distinct.index(x)] for x in choices]), device)


def _grid(shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """The grid of a mask with fewer axes than the tokens: the last axes are flattened."""
    return (*shape[: rank - 1], prod(shape[rank - 1 :]))


def _key_blocks(mask: BlockMask, shape: Sequence[int]) -> int:
    return prod(boxes(_grid(shape, len(mask.key_block)), mask.key_block))


def _on_grid(x: Tensor, rank: int) -> Tensor:
    """`[B, *spatial, heads, d]` with the last spatial axes flattened to `rank` in all."""
    return x.flatten(rank, -3)


@torch.no_grad()
def head_recalls(
    query: Tensor, key: Tensor, candidates: Sequence[HeadChoice], *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The share of dense attention's mass that candidates keep, from log-sum-exps.

    Args:
        query, key: `[B, *spatial, heads, d]`, key of the same grid.
        candidates: static masks.
        scale: factor on query . key; d ** -0.5 when None.

    Returns:
        recall `[candidates, heads]`, the mean over the batch and the queries.
        density `[candidates]`, the share of pairs of tokens.
    """
    check_query_key(query, key)
    shape, recalls, densities = tuple(query.shape[1:-2]), [], []
    everything: dict[tuple, Tensor] = {}
    for choice in candidates:
        mask = on_device(choice_mask(choice, shape), query.device)
        rank = len(mask.query_block)
        q, k = _on_grid(query, rank), _on_grid(key, rank)
        cut = mask.query_block, mask.key_block
        if cut not in everything:
            count, rows = _key_blocks(mask, shape), mask.kv_num.shape[-1]
            lists = torch.arange(count, dtype=torch.int32, device=query.device).expand(1, 1, rows, count)
            full = mask._replace(kv_num=torch.full_like(mask.kv_num, count), kv_idx=lists)
            everything[cut] = block_sparse_attention(q, k, k, mask=full, scale=scale, return_lse=True)[1]
        kept = block_sparse_attention(q, k, k, mask=mask, scale=scale, return_lse=True)[1]
        recalls.append((kept - everything[cut]).exp().flatten(0, -2).mean(0))
        densities.append(density(mask, _grid(shape, rank))[0, 0])
    return torch.stack(recalls), torch.stack(densities)


def _to_plan(picks: Sequence[HeadChoice | None], layers: int | None, steps: tuple[float, float]) -> HeadPlan:
    """One choice for all heads that make it; None is dense."""
    grouped: list[tuple[HeadChoice, list[int]]] = []
    for head, pick in enumerate(picks):
        if pick is None:
            continue
        for choice, heads in grouped:
            if choice is pick:
                heads.append(head)
                break
        else:
            grouped.append((pick, [head]))
    where = None if layers is None else (layers,)
    return HeadPlan(tuple(replace(x, layers=where, heads=tuple(heads), steps=steps) for x, heads in grouped))


def plan_by_recall(
    query: Tensor,
    key: Tensor,
    candidates: Sequence[HeadChoice],
    *,
    recall: float = 0.95,
    layer: int | None = None,
    steps: tuple[float, float] = (0.0, 1.0),
    scale: float | None = None,
) -> HeadPlan:
    """Every head takes the sparsest candidate that keeps the share `recall` of its attention, or stays dense.

    Heads change their part between denoising steps (Sparse VideoGen, arXiv:2502.01776): plan each range of steps from
    queries and keys of its own.

    Args:
        query, key: `[B, *spatial, heads, d]`, key of the same grid.
        candidates: static masks; their layers, heads and steps are ignored.
        recall: in (0, 1].
        layer, steps: that the plan is about; None for all layers.
        scale: factor on query . key; d ** -0.5 when None.
    """
    if not 0 < recall <= 1:
        raise ValueError(f"recall={recall!r} must lie in (0, 1]")
    recalls, densities = head_recalls(query, key, candidates, scale=scale)
    ranked = sorted(range(len(candidates)), key=lambda i: float(densities[i]))
    enough = (recalls >= recall).tolist()
    picks = [next((candidates[i] for i in ranked if enough[i][head]), None) for head in range(query.shape[-2])]
    return _to_plan(picks, layer, steps)


@torch.no_grad()
def mask_influence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    *,
    query_block: PerAxis[int],
    key_block: PerAxis[int],
    scale: float | None = None,
) -> Tensor:
    """First-order change of the loss if a single pair of tokens is masked and its row renormalised, absolute values
    summed over pairs of blocks (MoA, arXiv:2406.14909, section 4).

    With probabilities A and G = dloss/dA, `grad_output . value`: `-A_ij (G_ij - sum_k A_ik G_ik) / (1 - A_ij)`.

    Args:
        query, key, value: as of `block_sparse_attention`, dense attention's inputs.
        grad_output: gradient of the loss to its output.
        query_block, key_block: tokens of a block along each axis.
        scale: factor on query . key; d ** -0.5 when None.

    Returns:
        `[heads, query blocks, key blocks]`, summed over the batch, not negative.
    """
    query_block, key_block = check_blocks(query, key, query_block, key_block)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale, group = resolve_scale(query, scale), query.shape[-2] // key.shape[-2]
    q, q_there = cut_into_blocks(query.to(dtype) * scale, query_block)
    grad, _ = cut_into_blocks(grad_output.to(dtype), query_block)
    q, grad = (x.permute(0, 3, 1, 2, 4) for x in (q, grad))  # [B, heads, blocks, tokens, d]
    k, k_there = cut_into_blocks(key.to(dtype).repeat_interleave(group, dim=-2), key_block)
    v, _ = cut_into_blocks(value.to(dtype).repeat_interleave(group, dim=-2), key_block)
    k, v = (x.flatten(1, 2).permute(0, 2, 3, 1)[:, :, None] for x in (k, v))  # [B, heads, 1, d, keys]
    step = max(1, LOGITS // (q.shape[0] * q.shape[1] * q.shape[3] * k.shape[-1]))
    rows = []
    for start in range(0, q.shape[2], step):
        part = slice(start, start + step)
        with without_autocast(query.device):
            shares = (q[:, :, part] @ k).masked_fill(~k_there.flatten(), -torch.inf).softmax(-1)
            pull = grad[:, :, part] @ v
        change = shares * (pull - (shares * pull).sum(-1, keepdim=True)) / (1 - shares).clamp(min=1e-12)
        change = (change.abs() * q_there[part, :, None]).unflatten(-1, k_there.shape)
        rows.append(change.sum((-1, -3)).sum(0))
    return torch.cat(rows, dim=1)


def assign(costs: Tensor, densities: Tensor, budget: float) -> list[int]:
    """The option of every head by which the sum of costs is least while the mean density stays within a budget, to
    within one head's step: heads move along the lower convex hull of their options, least loss per saving first.

    Args:
        costs: `[heads, options]`.
        densities: `[options]`.
        budget: of the mean density.

    Raises:
        ValueError: a budget that the sparsest option exceeds.
    """
    price, size = costs.double().tolist(), densities.double().tolist()
    if budget < min(size):
        raise ValueError(f"budget={budget!r} must be at least {min(size)}, the density of the sparsest option")
    picks, moves = [], []
    for head, cost in enumerate(price):
        at = min(range(len(size)), key=lambda i: (cost[i], size[i]))
        picks.append(at)
        while True:
            sparser = [i for i in range(len(size)) if size[i] < size[at]]
            if not sparser:
                break
            to = min(sparser, key=lambda i: ((cost[i] - cost[at]) / (size[at] - size[i]), size[i]))
            moves.append(((cost[to] - cost[at]) / (size[at] - size[to]), head, to))
            at = to
    total = sum(size[i] for i in picks)
    for _, head, to in sorted(moves):
        if total <= budget * len(picks) + 1e-12:
            break
        total += size[to] - size[picks[head]]
        picks[head] = to
    return picks


def plan_by_influence(
    influence: Tensor,
    shape: Sequence[int],
    candidates: Sequence[HeadChoice],
    *,
    budget: float,
    layer: int | None = None,
    steps: tuple[float, float] = (0.0, 1.0),
) -> HeadPlan:
    """Heads share a budget of density such that the influence of what is masked is least (MoA).

    Args:
        influence: `[heads, query blocks, key blocks]` of `mask_influence`, averaged over data.
        shape: tokens of the grid along each axis.
        candidates: static masks of the same blocks.
        budget: mean density of all heads, in (0, 1].
        layer, steps: that the plan is about; None for all layers.

    Raises:
        ValueError: candidates of other blocks than `influence`, or a budget that none keeps.
    """
    losses, densities = [torch.zeros(len(influence))], [torch.ones((), dtype=torch.float64)]
    for choice in candidates:
        mask = choice_mask(choice, shape)
        count = _key_blocks(mask, shape)
        if influence.shape[1:] != (mask.kv_num.shape[-1], count):
            raise ValueError(
                f"influence.shape={tuple(influence.shape)} must be [heads, {mask.kv_num.shape[-1]}, {count}], "
                f"the blocks of mask={choice.mask!r}"
            )
        listed = torch.arange(mask.kv_idx.shape[-1]) < mask.kv_num[..., None]
        kept = torch.zeros(mask.kv_num.shape[-1], count + 1, dtype=torch.bool)
        kept = kept.scatter(-1, torch.where(listed, mask.kv_idx.long(), count)[0, 0], True)[:, :count]
        losses.append(influence.cpu().masked_fill(kept, 0).sum((1, 2)))
        densities.append(density(mask, _grid(shape, len(mask.query_block)))[0, 0])
    picks = assign(torch.stack(losses, dim=1), torch.stack(densities), budget)
    return _to_plan([None if i == 0 else candidates[i - 1] for i in picks], layer, steps)


def gated(dense: Tensor, sparse: Tensor, gates: Tensor) -> Tensor:
    """Outputs of dense and sparse attention mixed by a gate per head, to learn which heads need the dense one
    (DuoAttention, arXiv:2410.10819, section 2): train the gates alone, from 1, on the change of the output plus
    0.05 times their mean. Differentiable.

    Args:
        dense, sparse: `[B, *spatial, heads, d]`.
        gates: `[heads]`; they count clamped to [0, 1].
    """
    return torch.lerp(sparse, dense, gates.clamp(0, 1).to(dense.dtype)[:, None])


def plan_by_gates(
    gates: Tensor,
    sparse: HeadChoice,
    *,
    share: float | None = None,
    threshold: float | None = None,
    steps: tuple[float, float] = (0.0, 1.0),
) -> HeadPlan:
    """Heads of high gates stay dense, the others take `sparse`.

    Args:
        gates: `[layers, heads]`, of `gated`.
        sparse: a static mask.
        share: of all heads that stay dense, those of the highest gates.
        threshold: or those of at least this gate.
        steps: that the plan is about.

    Raises:
        ValueError: both or none of `share` and `threshold`.
    """
    if (share is None) == (threshold is None):
        raise ValueError(f"share={share!r} and threshold={threshold!r}: give one of them")
    if threshold is None:
        assert share is not None
        ranked = gates.flatten().sort(descending=True, stable=True).indices
        stay = torch.zeros(gates.numel(), dtype=torch.bool, device=gates.device)
        stay[ranked[: round(share * gates.numel())]] = True
        stay = stay.view(gates.shape)
    else:
        assert threshold is not None
        stay = gates >= threshold
    rows = stay.tolist()
    return join(_to_plan([None if flag else sparse for flag in row], layer, steps) for layer, row in enumerate(rows))
