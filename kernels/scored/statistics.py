"""Statistics of softmax attention, row by row, without the matrix of weights: entropy, sinks, windows, top keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..common.calling import check_grids, resolve_scale, without_autocast
from .call import check_mask, lay_out, rows_of
from .chunked import chunk_rows
from .columns import ColumnMask
from .rows import softmax


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics per query and head, `[B, *spatial, heads]` each, float32 or float64.

    Attributes:
        entropy: of the weights in nats: 0 (one key) to log(keys) (uniform).
        lse: log-sum-exp of the logits.
        largest: largest weight.
        squares: sum of squared weights; its inverse is the effective number of keys.
        top: weight of the `topk` keys with the largest weights; None without `topk`.
        mass: weight on each set of keys, by name.
        distance: norm of what the keys outside of the top leave of the output, relative to the output: 0 when the top
            keys alone give it; None without `value` and `topk`.
    """

    entropy: Tensor
    lse: Tensor
    largest: Tensor
    squares: Tensor
    top: Tensor | None = None
    mass: dict[str, Tensor] = field(default_factory=dict)
    distance: Tensor | None = None

    def summary(self) -> dict[str, float]:
        """Mean of each statistic over batch, queries and heads."""
        named = {name: getattr(self, name) for name in ("entropy", "lse", "largest", "squares", "top", "distance")}
        named |= {f"mass_{name}": x for name, x in self.mass.items()}
        return {name: x.mean().item() for name, x in named.items() if x is not None}


@torch.no_grad()
def attention_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    scale: float | None = None,
    mask: ColumnMask | None = None,
    topk: int | None = None,
    window: Sequence[int] | None = None,
    sets: Mapping[str, Tensor | ColumnMask] | None = None,
) -> AttentionStatistics:
    """Measure where softmax attention looks, with the logits of a chunk of queries in memory at a time.

    Args:
        query: `[B, *spatial, heads, head_dim]` with 1 to 3 spatial axes, any floating dtype.
        key: `[B, *key_spatial, key_heads, head_dim]`; heads is a multiple of key_heads.
        value: like key, for `distance`.
        scale: factor on query . key; head_dim ** -0.5 when None.
        mask: visibility; see `ColumnMask`.
        topk: number of keys for `top` and `distance`.
        window: odd lengths, one per axis: the weight on keys at most half of them away from the query is the set
            "window". Needs keys on the grid of the queries.
        sets: sets of keys by name: bool `[keys]`, such as registers or the first token, or a `ColumnMask` whose
            visible keys count.

    Returns:
        An `AttentionStatistics`.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it.
    """
    check_grids(query.dim() - 3, query, key, key if value is None else value, cross=True)
    with without_autocast(query.device):
        q, k, v = lay_out(query, key, key if value is None else value)
        check_mask(mask, q.transpose(1, 2), k.transpose(1, 2))
        tokens, keys = q.shape[2], k.shape[2]
        if topk is not None and not 1 <= topk <= keys:
            raise ValueError(f"topk={topk} must lie in [1, keys={keys}]")
        chosen = _check_sets(sets or {}, keys)
        near = None if window is None else _coordinates(window, query, key)
        rows = chunk_rows(q.shape[0], q.shape[1], keys)
        parts: dict[str, list[Tensor]] = {}
        for first in range(0, tokens, rows):
            last = min(first + rows, tokens)
            found = rows_of(q, k, v, mask, resolve_scale(query, scale), first, last)
            measured = _measure(found, topk, value is not None)
            weights = measured.pop("weights")
            for name, part in chosen.items():
                inside = part.visible(tokens, first, last) if isinstance(part, ColumnMask) else part
                measured[f"mass.{name}"] = (weights * inside).sum(-1)
            if near is not None and window is not None:
                measured["mass.window"] = (weights * _within(near, window, first, last)).sum(-1)
            for name, x in measured.items():
                parts.setdefault(name, []).append(x)
        whole = {n: torch.cat(x, dim=2).transpose(1, 2).reshape(query.shape[:-1]) for n, x in parts.items()}
    mass = {name.removeprefix("mass."): x for name, x in whole.items() if name.startswith("mass.")}
    return AttentionStatistics(**{n: x for n, x in whole.items() if not n.startswith("mass.")}, mass=mass)


def _measure(rows, topk: int | None, has_value: bool) -> dict[str, Tensor]:
    """Statistics of some rows, and their weights."""
    logits = rows.logits()
    weights, lse = softmax(logits, rows)
    entropy = lse.masked_fill(lse == -torch.inf, 0.0) - (weights * rows.masked(logits)).sum(-1)  # H = lse - sum p s
    found = {
        "weights": weights,
        "entropy": entropy.clamp_min(0.0),
        "lse": lse,
        "largest": weights.amax(-1),
        "squares": (weights**2).sum(-1),
    }
    if topk is not None:
        values, places = weights.topk(topk, dim=-1)
        found["top"] = values.sum(-1)
        if has_value:
            out = weights @ rows.value
            rest = weights.scatter(-1, places, 0.0) @ rows.value
            norm = out.norm(dim=-1)
            found["distance"] = rest.norm(dim=-1) / norm.masked_fill(norm == 0, 1.0)
    return found


def _check_sets(sets: Mapping[str, Tensor | ColumnMask], keys: int) -> dict[str, Tensor | ColumnMask]:
    for name, x in sets.items():
        if name == "window":
            raise ValueError("sets has a set named 'window': that is the set of the argument window")
        if isinstance(x, ColumnMask):
            if x.num_keys != keys:
                raise ValueError(f"sets[{name!r}] has {x.num_keys} keys; expected {keys}")
        elif x.dtype != torch.bool or x.shape != (keys,):
            raise ValueError(f"sets[{name!r}] ({x.dtype}, {tuple(x.shape)}) must be bool [keys={keys}] or a ColumnMask")
    return dict(sets)


def _coordinates(window: Sequence[int], query: Tensor, key: Tensor) -> Tensor:
    """Place of each token on its axes, `[axes, tokens]`."""
    shape = query.shape[1:-2]
    if len(window) != len(shape) or any(w < 1 or w % 2 == 0 for w in window):
        raise ValueError(f"window={tuple(window)} must hold {len(shape)} odd lengths, one per axis")
    if key.shape[1:-2] != shape:
        raise ValueError(f"window needs keys on the grid of queries, {tuple(shape)}, not {tuple(key.shape[1:-2])}")
    axes = [torch.arange(n, device=query.device) for n in shape]
    return torch.stack([x.flatten() for x in torch.meshgrid(*axes, indexing="ij")])


def _within(places: Tensor, window: Sequence[int], first: int, last: int) -> Tensor:
    """Pairs of queries `first` to `last` and keys inside of the window, bool `[rows, keys]`."""
    apart = (places[:, first:last, None] - places[:, None]).abs()
    reach = torch.tensor([w // 2 for w in window], device=places.device)[:, None, None]
    return (apart <= reach).all(0)
