"""Steps that masks share: score pairs of blocks, keep some, write them down as lists.

A dynamic mask is an estimate, a rule and what is always kept: `to_mask(keep(block_scores(query, key, …), rule=…), …)`.
A static mask is a relation of tokens along every axis, or a pattern of `static_blocks`. Lists are data: nothing here
has the size of tokens times tokens, and nothing that works on queries and keys waits for the device.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, prod
from typing import Any, Literal

import torch
from torch import Tensor

from ..block_sparse.mask import boxes
from ..common.calling import PerAxis, per_axis, resolve_scale, without_autocast
from .blocks import block_extrema, block_lengths, block_means, check_query_key, cut_into_blocks, outer_and, to_mask

Rule = Literal["topk", "mass", "threshold", "budget"]
Scope = Literal["row", "head", "all"]
RULES = ("topk", "mass", "threshold", "budget")
__all__ = ["HeadChoice", "HeadPlan", "block_scores", "keep", "static_blocks", "to_mask"]
SCOPES = {"row": -1, "head": -2, "all": -3}  # first dimension of `[B, heads, queries, keys]` that is ranked together


# Scores


def pair_scores(query: Tensor, key: Tensor, *, scale: float, per: Literal["head", "all"] = "head") -> Tensor:
    """Logits of all pairs of `[B, M, heads, d]` and `[B, N, key_heads, d]`: `[B, heads, M, N]`.

    With per="all" their mean over heads, `[B, 1, M, N]`. Grouped key heads serve their query heads.
    """
    with without_autocast(query.device):
        key = key.repeat_interleave(query.shape[-2] // key.shape[-2], dim=-2)
        if per == "all":
            scale, query, key = scale / query.shape[-2], query.flatten(-2)[:, :, None], key.flatten(-2)[:, :, None]
        return (query.transpose(1, 2).to(key.dtype) * scale) @ key.permute(0, 2, 3, 1)


@torch.no_grad()
def block_scores(
    query: Tensor,
    key: Tensor,
    *,
    query_block: PerAxis[int],
    key_block: PerAxis[int],
    estimate: Literal["mean", "maxminavg", "minmax", "probe"] = "mean",
    per: Literal["head", "all"] = "head",
    scale: float | None = None,
    weight: Tensor | None = None,
    samples: int = 16,
) -> Tensor:
    """Estimated logits of every block of queries with every block of keys.

    Args:
        query, key: `[B, *spatial, heads, d]`, `[B, *key_spatial, key_heads, d]`.
        query_block, key_block: tokens of a block along each axis.
        estimate: "mean": mean query times mean key. "minmax": the largest product that the mean query can have with a
            key between the block's smallest and largest channels (HiP, arXiv:2406.09827, group variant; Quest).
            "maxminavg": mean query times a linear map of [largest, smallest, mean] key, by `weight` (SeerAttention,
            arXiv:2410.13276). "probe": the largest product of up to `samples` evenly spaced queries of the block with
            the mean key.
        per: "head", or "all" heads together, their mean.
        scale: factor on query . key; d ** -0.5 when None.
        weight: of "maxminavg", `[heads, 3 * d, d]`.
        samples: of "probe", queries of a block.

    Returns:
        `[B, heads or 1, query blocks, key blocks]`, float32, float64 for float64 inputs.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    rank = check_query_key(query, key)
    query_block = block_lengths("query_block", query_block, rank)
    key_block = block_lengths("key_block", key_block, rank)
    scale = resolve_scale(query, scale)
    if estimate == "mean":
        return pair_scores(block_means(query, query_block), block_means(key, key_block), scale=scale, per=per)
    if estimate == "minmax":
        low, high = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in block_extrema(key, key_block))
        middle = block_means(query, query_block)
        above = pair_scores(middle.clamp(min=0), high, scale=scale, per=per)
        return above + pair_scores(middle.clamp(max=0), low, scale=scale, per=per)
    if estimate == "maxminavg":
        if weight is None:
            raise ValueError("estimate='maxminavg' needs weight, [heads, 3 * head_dim, head_dim]")
        low, high = block_extrema(key, key_block)
        pooled = torch.cat([high, low, block_means(key, key_block)], dim=-1)  # [B, key blocks, key_heads, 3d]
        pooled = pooled.repeat_interleave(query.shape[-2] // key.shape[-2], dim=-2)
        mapped = torch.einsum("bnhc,hcd->bnhd", pooled, weight.to(pooled.dtype))
        return pair_scores(block_means(query, query_block), mapped, scale=scale, per=per)
    if estimate == "probe":
        tokens, exists = cut_into_blocks(query, query_block)
        chosen = torch.linspace(0, tokens.shape[2] - 1, min(samples, tokens.shape[2]), device=query.device).long()
        probes, there = tokens[:, :, chosen], exists[:, chosen].any(1)
        counted = exists[:, chosen] | ~there[:, None]  # a short block without a sample counts its zeros
        logits = pair_scores(probes.flatten(1, 2).to(torch.promote_types(query.dtype, torch.float32)),
                             block_means(key, key_block), scale=scale, per=per)  # fmt: skip
        logits = logits.unflatten(2, (tokens.shape[1], -1))
        return logits.masked_fill(~counted[:, :, None], -torch.inf).amax(3)
    raise ValueError(f"estimate={estimate!r} must be 'mean', 'minmax', 'maxminavg' or 'probe'")


# Rules


def _flatten(x: Tensor, scope: Scope) -> Tensor:
    return x.flatten(SCOPES[scope]) if scope != "row" else x


def _check_rule(rule: str, scope: str, given: dict[str, Any]) -> None:
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} must be one of {RULES}")
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} must be one of {tuple(SCOPES)}")
    if given[rule] is None:
        raise ValueError(f"rule={rule!r} needs {rule}=")
    if others := [name for name, x in given.items() if name != rule and x is not None]:
        raise ValueError(f"rule={rule!r} takes {rule}=, not {others[0]}={given[others[0]]!r}")
    if rule == "topk" and given["topk"] < 1:
        raise ValueError(f"topk={given['topk']!r} must be at least 1")
    if rule in ("mass", "budget") and not 0 <= given[rule] <= 1:
        raise ValueError(f"{rule}={given[rule]!r} must lie in [0, 1]")


def _highest(x: Tensor, number: int) -> Tensor:
    """The `number` highest along the last dimension, bool; ties go to the lowest index, whatever `torch.topk` does."""
    count = x.shape[-1]
    if number >= count:
        return torch.ones_like(x, dtype=torch.bool)
    if number < 1:
        return torch.zeros_like(x, dtype=torch.bool)
    if 4 * number > count:  # a sort is no slower
        order = x.sort(dim=-1, descending=True, stable=True).indices
        chosen = (torch.arange(count, device=x.device) < number).expand(x.shape)
        return torch.zeros_like(x, dtype=torch.bool).scatter(-1, order, chosen)
    last = x.topk(number, dim=-1).values[..., -1:]
    above, equal = x > last, x == last
    return above | (equal & (equal.cumsum(-1) <= number - above.sum(-1, keepdim=True)))


@torch.no_grad()
def keep(
    scores: Tensor,
    *,
    rule: Rule,
    topk: int | None = None,
    mass: float | None = None,
    threshold: float | Tensor | None = None,
    budget: float | None = None,
    least: int = 1,
    most: int | None = None,
    scope: Scope = "row",
    mass_crossing: bool = True,
    always: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """Choose pairs of blocks by their scores. Ties go to the lowest index.

    `allowed` comes before the rule, `always` after it: what is always kept counts neither in `topk` nor in `mass`.

    Args:
        scores: `[B, heads or 1, query blocks, key blocks]`.
        rule: "topk": the `topk` highest of every row. "mass": the fewest highest of which the sum reaches the share
            `mass` of all; scores are then weights, not negative (`softmax` them first). "threshold": all of at least
            `threshold`, a number or a tensor that broadcasts. "budget": the share `budget` of all pairs, rounded up.
        topk: at least 1; in a scope of several rows that many a row on average.
        mass, budget: in [0, 1].
        least: pairs that a row keeps whatever the rule says, its highest.
        most: pairs that a row keeps at most, its highest, before `always`.
        scope: what is ranked together: "row", all rows of a "head", or "all" rows of all heads of a batch entry.
        mass_crossing: whether the pair with which the sum passes `mass` is kept.
        always, allowed: bool, broadcast to the scores.

    Returns:
        bool, the shape of `scores`.

    Raises:
        ValueError: an argument outside what is accepted.
    """
    _check_rule(rule, scope, {"topk": topk, "mass": mass, "threshold": threshold, "budget": budget})
    if allowed is not None:
        scores = scores.masked_fill(~allowed, 0 if rule == "mass" else -torch.inf)
    flat = _flatten(scores, scope)
    if threshold is not None:
        kept = scores >= threshold
    elif mass is not None:
        ranked, order = flat.sort(dim=-1, descending=True, stable=True)
        rest = ranked.flip(-1).cumsum(-1).flip(-1)  # from this pair to the last: exact zeros at the end
        enough = (1 - mass) * rest[..., :1]
        if not mass_crossing:
            rest = torch.cat([rest[..., 1:], torch.zeros_like(rest[..., :1])], dim=-1)
        kept = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, order, rest >= enough).view(scores.shape)
    else:
        count, rows = flat.shape[-1], flat.shape[-1] // scores.shape[-1]
        number = topk * rows if topk is not None else ceil((budget or 0.0) * count - 1e-9)  # 0.3 of 10 is 3, not 4
        kept = _highest(flat, number).view(scores.shape)
    if least > 0 and not (topk is not None and scope == "row" and least <= topk):
        kept = kept | _highest(scores, least)
    if most is not None:
        kept = kept & _highest(scores, most)
    kept = kept if allowed is None else kept & allowed
    return kept if always is None else kept | always


# Patterns of blocks


def _distances(counts: Sequence[int]) -> list[Tensor]:
    """Signed distances of blocks along every axis, key less query: `[n, n]` an axis."""
    return [torch.arange(n) - torch.arange(n)[:, None] for n in counts]


def _at_least_one(name: str, x: PerAxis[int], rank: int) -> tuple[int, ...]:
    values = per_axis(name, x, rank, int)
    if any(n < 1 for n in values):
        raise ValueError(f"{name}={x!r} must be at least 1 along each axis: a block keeps itself")
    return values


def _band_global(counts: Sequence[int], *, band: PerAxis[int], first: int = 1, causal: bool = False) -> Tensor:
    bands = _at_least_one("band", band, len(counts))
    near = outer_and([x.abs() < n for x, n in zip(_distances(counts), bands, strict=True)])
    number = torch.arange(prod(counts))
    kept = near | (number < first) | ((number < first)[:, None] & torch.tensor(not causal))
    return (kept & (number <= number[:, None]) if causal else kept)[None]


def _local_stride(counts: Sequence[int], *, heads: int, stride: PerAxis[int], local: PerAxis[int] = 1) -> Tensor:
    strides, locals_ = (_at_least_one(name, x, len(counts)) for name, x in (("stride", stride), ("local", local)))
    near = outer_and([x.abs() < n for x, n in zip(_distances(counts), locals_, strict=True)])
    places = torch.unravel_index(torch.arange(prod(counts)), tuple(counts))
    kept = []
    for head in range(heads):
        shard, phase = torch.ones(prod(counts), dtype=torch.bool), head
        for place, step in zip(reversed(places), reversed(strides), strict=True):
            shard &= (place + phase % step) % step == 0
            phase //= step
        kept.append(near | shard)
    return torch.stack(kept)


def _power(counts: Sequence[int], *, local: int = 1) -> Tensor:
    def reached(x: Tensor) -> Tensor:  # 0 and powers of two are what has no common bit with what precedes it
        x = x.abs()
        return (x & (x - 1).clamp(min=0)) == 0

    _at_least_one("local", local, 1)
    distances = _distances(counts)
    kept = outer_and([x.abs() < local for x in distances])
    for axis in range(len(counts)):
        kept |= outer_and([reached(x) if i == axis else x == 0 for i, x in enumerate(distances)])
    return kept[None]


PATTERNS = {"band_global": _band_global, "local_stride": _local_stride, "power": _power}


def static_blocks(shape: Sequence[int], block: PerAxis[int], pattern: str, **options: Any) -> Tensor:
    """Pairs of blocks of a fixed pattern.

    Args:
        shape: tokens of the grid along each axis.
        block: tokens of a block along each axis.
        pattern: "band_global": blocks less than `band` away along every axis, and the `first` blocks, which see and are
            seen by everybody; `causal` drops keys that follow. "local_stride": less than `local` away, and every
            `stride`-th block along each axis, counted from another one in each of `heads`. "power": less than `local`
            away, and at distance 1, 2, 4, … along one axis.
        options: of the pattern, in blocks.

    Returns:
        bool `[heads or 1, blocks, blocks]` on the host.

    Raises:
        ValueError: an unknown pattern.
        TypeError: an option that the pattern lacks.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern={pattern!r} must be one of {tuple(PATTERNS)}")
    counts = boxes(shape, block_lengths("block", block, len(shape)))
    return PATTERNS[pattern](counts, **options)


# Plans


@dataclass(frozen=True)
class HeadChoice:
    """Mask of some heads of some layers in a range of steps.

    Attributes:
        mask: name of a static mask of `foveal.kernels.masks`, or "dense".
        options: its keyword arguments, JSON values.
        layers, heads: numbers, or None for all.
        steps: first and last share of the denoising steps, [first, last).
    """

    mask: str
    options: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    steps: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        for name in ("layers", "heads"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "steps", tuple(self.steps))
        if len(self.steps) != 2 or not 0 <= self.steps[0] < self.steps[1] <= 1:
            raise ValueError(f"steps={self.steps!r} must be two shares, 0 <= first < last <= 1")

    def holds(self, layer: int, head: int, step: float) -> bool:
        """Return whether the choice is about a head of a layer at a share of the steps."""
        within = self.steps[0] <= step < self.steps[1]
        return within and all(x is None or n in x for x, n in ((self.layers, layer), (self.heads, head)))


@dataclass(frozen=True)
class HeadPlan:
    """Static masks by head, layer and step; the first choice that holds counts.

    Heads without a choice are dense. A plan is JSON: `HeadPlan.from_json(plan.to_json()) == plan`.
    """

    choices: tuple[HeadChoice, ...] = ()

    def choice(self, layer: int, head: int, step: float = 0.0) -> HeadChoice:
        """Choice of a head at a share of the steps, in [0, 1)."""
        return next((x for x in self.choices if x.holds(layer, head, step)), HeadChoice("dense"))

    def to_json(self) -> str:
        return json.dumps({"choices": [asdict(x) for x in self.choices]}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> HeadPlan:
        """Read what `to_json` wrote.

        Raises:
            ValueError: not a plan.
        """
        try:
            read = json.loads(text)
            return cls(tuple(HeadChoice(**entry) for entry in read["choices"]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a head plan: {error}") from error
