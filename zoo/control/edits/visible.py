"""Visibility between streams and regions of tokens, as lists of keys for groups of queries that see the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, log
from typing import Any

import torch
from torch import Tensor

from ...sites import Call, Schedule
from ..edit import Context, Edit
from ..regions import regions_to_grid
from ..where import Where

RULES = ("all", "none", "own", "region", "inside", "background", "region+background")
MOST_GROUPS = 64  # beyond, pieces of queries with their biases cost less than as many calls
PIECE = 256


@dataclass(frozen=True)
class Groups:
    """A bias on logits with few distinct rows.

    Attributes:
        group: group of each query, int64 `[queries]`.
        bias: `[groups, keys]`, 0 where visible, -inf where not, or anything between.
    """

    group: Tensor
    bias: Tensor

    def dense(self) -> Tensor:
        """`[queries, keys]`, for tests and pictures."""
        return self.bias[self.group]

    def joined(self, other: Groups) -> Groups:
        """Both: visible to both, biases added."""
        pairs, group = torch.stack([self.group, other.group], 1).unique(dim=0, return_inverse=True)
        return Groups(group, self.bias[pairs[:, 0]] + other.bias[pairs[:, 1]])


@dataclass(frozen=True)
class Members:
    """Streams and regions of tokens.

    Attributes:
        streams: name of the stream of each token.
        regions: share of each token in each region, in 0..1, `[tokens, regions]`.
        same: number of each token's own member for the rule "own"; tokens with equal numbers see each other.
    """

    streams: Sequence[str]
    regions: Tensor
    same: Tensor


def relate(
    queries: Members,
    keys: Members,
    rules: Mapping[tuple[str, str], str],
    *,
    weights: Mapping[tuple[str, str], float] | None = None,
    fractional: bool = False,
) -> Groups:
    """Visibility from rules on pairs of streams.

    Args:
        queries, keys: of an operation.
        rules: (query's stream, key's stream) → "all", "none", "own" (the same member), "region" (a region in common),
            "inside" (keys in any region), "background" (queries in no region), or "region+background" (a region in
            common, or queries in none). A pair that is missing is "none".
        weights: pair of streams → factor on its probabilities, as its logarithm on the logits.
        fractional: whether "region" weighs by the shares in common, else it is visible where there are any.

    Raises:
        ValueError: a rule that is not one, or a query that sees nothing.
    """
    if wrong := sorted(set(rules.values()) - set(RULES)):
        raise ValueError(f"rules have {wrong}; a rule is one of {RULES}")
    names = sorted({*queries.streams, *keys.streams})
    kinds = [torch.tensor([names.index(name) for name in x.streams]) for x in (queries, keys)]
    facts = torch.cat([kinds[0][:, None].double(), queries.same[:, None].double(), queries.regions.double()], 1)
    rows, group = facts.unique(dim=0, return_inverse=True)
    bias = torch.full((len(rows), len(keys.streams)), -inf, dtype=torch.float64)
    common = rows[:, 2:] @ keys.regions.double().T  # [groups, keys]
    nowhere = (rows[:, 2:] == 0).all(1)[:, None].expand_as(common)
    own = rows[:, 1:2] == keys.same.double()
    shared = common.clamp(max=1).log() if fractional else torch.where(common > 0, 0.0, -inf).double()
    yes, no = torch.zeros_like(shared), torch.full_like(shared, -inf)
    values = {
        "all": yes,
        "none": no,
        "own": torch.where(own, yes, no),
        "region": shared,
        "inside": torch.where((keys.regions > 0).any(1), yes, no),
        "background": torch.where(nowhere, yes, no),
        "region+background": torch.where(nowhere, yes, shared),
    }
    for (asking, asked), rule in rules.items():
        if asking not in names or asked not in names:
            continue
        part = (rows[:, :1] == names.index(asking)) & (kinds[1] == names.index(asked))
        weight = (weights or {}).get((asking, asked), 1.0)
        bias = torch.where(part, values[rule] + (log(weight) if weight > 0 else -inf), bias)
    if (blind := (bias == -inf).all(1)).any():
        stream = names[int(rows[blind.nonzero()[0, 0], 0])]
        raise ValueError(f"a token of the stream {stream!r} sees nothing by rules={dict(rules)}; let it see itself")
    return Groups(group, bias)


class Visible(Edit):
    """Attention by rules on streams and regions. Visibilities of several edits intersect.

    Streams of a rule: "image" (the grid), "entity" (text tokens of a region's word), "text" (all other text tokens),
    "reference", "padding".

    Args:
        rules: see `relate`.
        regions: masks `[regions, height, width]` or `[regions, frames, height, width]`, bool or shares in 0..1.
        words: word of the Control for each region; their tokens are the stream "entity".
        reference: number of the region that the tokens of the stream "reference" are in, which has no word; the last.
        weights, fractional: see `relate`.
        branch: name of the prompt; all when None.
        where, schedule, guidance: sites, steps and rows.

    Raises:
        ValueError: other than one word for each region, or an unknown rule.
    """

    owner = True

    def __init__(
        self,
        rules: Mapping[tuple[str, str], str],
        regions: Tensor | None = None,
        words: Sequence[str] = (),
        *,
        weights: Mapping[tuple[str, str], float] | None = None,
        fractional: bool = False,
        reference: int | None = None,
        branch: str | None = None,
        where: Where | None = None,
        schedule: Schedule | None = None,
        guidance: str = "cond",
    ):
        count = 0 if regions is None else len(regions)
        if reference is not None and reference != count - 1:
            raise ValueError(f"reference={reference} must be the last of the {count} regions")
        named = count if reference is None else count - 1
        if words and len(words) != named:
            raise ValueError(f"words={tuple(words)} must be one for each of the {named} regions")
        if wrong := sorted(set(rules.values()) - set(RULES)):
            raise ValueError(f"rules have {wrong}; a rule is one of {RULES}")
        self.rules, self.regions, self.words, self.reference = dict(rules), regions, tuple(words), reference
        self.weights, self.fractional = dict(weights or {}), fractional
        self.where, self.schedule = where or Where(), schedule or Schedule()
        self.guidance, self.branch, self.branches = guidance, branch, () if branch is None else (branch,)
        self._found: dict[tuple, Groups] = {}

    def plan(self, context: Context) -> Any:
        if all(rule == "all" for rule in self.rules.values()) and not self.weights:
            return None
        return [(self, context)], context.rows.of(self.branch, self.guidance)

    def join(self, plan: Any, other: Any, other_plan: Any) -> Any:
        """Both plans as one."""
        (found, rows), (more, other_rows) = plan, other_plan
        if rows != other_rows:
            raise ValueError(f"{self} and {other} must be for the same rows to meet at one site")
        return [*found, *more], rows

    def _members(self, call: Call, context: Context, *, keys: bool) -> Members:
        streams = call.operation.keys if keys else call.operation.queries
        tokens = (call.key if keys else call.query).shape[1]
        spans = context.layout.spans(context.site, streams, tokens)
        grid = context.layout.grid_of(context.site)
        count = 0 if self.regions is None else len(self.regions)
        shares, names, same = torch.zeros(tokens, count), [""] * tokens, torch.zeros(tokens, dtype=torch.int64)
        for stream, (first, end) in spans.items():
            plain = "image" if stream == "video" else stream
            names[first:end] = [plain] * (end - first)
            if plain == "image" and self.regions is not None and count and grid is not None:
                shares[first:end] = regions_to_grid(self.regions, grid).T
            if plain == "reference" and self.reference is not None:
                shares[first:end, self.reference] = 1
            if stream == "text":
                for region, word in enumerate(self.words):
                    for place in context.places_of([word], (first, end)):
                        names[place] = "entity"
                        shares[place, region] = 1
                        same[place] = 1 + region
        return Members(names, shares, same)

    def groups(self, call: Call, context: Context) -> Groups:
        """Groups of an operation; made once for a size."""
        layout = context.layout
        key = (layout.grid_of(context.site), call.query.shape[1], call.key.shape[1], call.operation)
        if key not in self._found:
            sides = (self._members(call, context, keys=k) for k in (False, True))
            self._found[key] = relate(*sides, self.rules, weights=self.weights, fractional=self.fractional)
        return self._found[key]

    def attend(self, call: Call, plan: Any, rows: Sequence[int], following: Callable[[Call], Tensor]) -> Tensor:
        found, chosen = plan
        groups: Groups | None = None
        for edit, context in found:
            more = edit.groups(call, context)
            groups = more if groups is None else groups.joined(more)
        assert groups is not None
        factor = call.query.shape[0] // len(rows)
        mine = [i * factor + j for i, row in enumerate(rows) if row in chosen for j in range(factor)]
        if len(mine) == call.query.shape[0]:
            return attend_by_groups(call, groups, following)
        out = following(call)
        index = torch.tensor(mine, device=out.device)
        mask = call.mask
        if mask is not None and mask.dim() >= 3 and mask.shape[0] == call.query.shape[0]:
            mask = mask[index]
        part = replace(call, query=call.query[index], key=call.key[index], value=call.value[index], mask=mask)
        return out.index_copy(0, index, attend_by_groups(part, groups, following))


def attend_by_groups(call: Call, groups: Groups, following: Callable[[Call], Tensor]) -> Tensor:
    """The operation with a bias: one call for each group on the keys that it sees."""
    device = call.query.device
    count = len(groups.bias)
    if count > MOST_GROUPS:
        pieces = []
        for first in range(0, call.query.shape[1], PIECE):
            end = first + PIECE
            bias = groups.bias[groups.group[first:end]][None, None].to(call.query)
            mask = _masked(call.mask, slice(first, end), slice(None), bias)
            pieces.append(following(replace(call, query=call.query[:, first:end], mask=mask)))
        return torch.cat(pieces, 1)
    out = call.query.new_empty(*call.query.shape[:3], call.value.shape[-1])
    for number in range(count):
        queries = (groups.group == number).nonzero()[:, 0].to(device)
        bias = groups.bias[number]
        keys = (bias > -inf).nonzero()[:, 0]
        even = bool((bias[keys] == bias[keys][0]).all())
        keys = keys.to(device)
        extra = None if even else bias.to(call.query)[keys][None, None, None]
        part = replace(
            call,
            query=call.query[:, queries],
            key=call.key[:, keys],
            value=call.value[:, keys],
            mask=_masked(call.mask, queries, keys, extra),
        )
        out[:, queries] = following(part)
    return out


def _masked(mask: Tensor | None, queries: Any, keys: Any, bias: Tensor | None) -> Tensor | None:
    """A model's own mask at some queries and keys, with a bias."""
    if mask is None:
        return bias
    mask = mask[..., keys]
    if mask.shape[-2] > 1:
        mask = mask[..., queries, :]
    if bias is None:
        return mask
    return bias.masked_fill(~mask, -inf) if mask.dtype == torch.bool else mask + bias
