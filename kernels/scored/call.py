"""One call of scored attention: checked arguments, laid out for the scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.calling import check_grids, resolve_scale
from .columns import ColumnMask
from .rows import Rows
from .score import Score


@dataclass(frozen=True)
class ScoredCall:
    """Everything but query, key and value; see `api.scored_attention`."""

    score: Score
    mask: ColumnMask | None
    order: Tensor | None
    scale: float


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: Score,
    mask: ColumnMask | None = None,
    order: Tensor | None = None,
    scale: float | None = None,
) -> ScoredCall:
    """The call of arguments that fit together.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
    """
    rank = query.dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(f"query has shape {tuple(query.shape)}; expected [B, 1 to 3 spatial axes, heads, head_dim]")
    check_grids(rank, query, key, value, cross=True)
    flat = [x.flatten(1, -3) for x in (query, key, value)]
    check_mask(mask, *flat[:2])
    tokens = flat[0].shape[1]
    if order is not None:
        if order.dtype.is_floating_point or order.dtype == torch.bool or order.shape != (tokens,):
            raise ValueError(f"order ({order.dtype}, {tuple(order.shape)}) must be a permutation, int64 [{tokens}]")
        if flat[1].shape[1] != tokens:
            raise ValueError(f"order needs as many keys ({flat[1].shape[1]}) as queries ({tokens})")
    score.check(*flat)
    return ScoredCall(score, mask, order, resolve_scale(query, scale))


def check_mask(mask: ColumnMask | None, query: Tensor, key: Tensor) -> None:
    """Refuse a mask for other operands `[B, tokens, heads, dim]`."""
    if mask is None:
        return
    batch, heads = query.shape[0], query.shape[2]
    if mask.num_keys != key.shape[1] or mask.start.shape[0] not in (1, batch) or mask.start.shape[1] not in (1, heads):
        expected = f"[B={batch} or 1, heads={heads} or 1, keys={key.shape[1]}]"
        raise ValueError(f"mask.start.shape={tuple(mask.start.shape)} must be {expected}")
    mask.positions(query.shape[1])
    if mask.start.device != query.device:
        raise ValueError(f"mask.start.device={mask.start.device} must equal query.device={query.device}")


def lay_out(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operands `[B, *spatial, heads, dim]` as `[B, heads, tokens, dim]`, in float32 at least, a key head per head."""
    wide, heads = torch.promote_types(query.dtype, torch.float32), query.shape[-2]
    q, k, v = (x.flatten(1, -3).transpose(1, 2).to(wide) for x in (query, key, value))
    group = heads // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return q, k, v


def rows_of(
    query: Tensor, key: Tensor, value: Tensor, mask: ColumnMask | None, scale: float, first: int, last: int
) -> Rows:
    """Queries `first` to `last` of laid out operands."""
    visible = None if mask is None else mask.visible(query.shape[2], first, last)
    return Rows(query[:, :, first:last], key, value, visible, scale, first)


def give_back(x: Tensor, like: Tensor) -> Tensor:
    """Output `[B, heads, tokens, value_dim]` on the grid and in the dtype of the query."""
    return x.transpose(1, 2).reshape(*like.shape[:-1], x.shape[-1]).to(like.dtype)


def give_back_lse(x: Tensor | None, like: Tensor) -> Tensor | None:
    """Log-sum-exp `[B, heads, tokens]` on the grid of the query."""
    return None if x is None else x.transpose(1, 2).reshape(like.shape[:-1])
