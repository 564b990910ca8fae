"""Words that count more or less: columns of the map times a factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...sites import Call, Schedule
from ..channels import with_bias
from ..edit import Context, Edit
from ..terms import Term, take
from ..where import Where


class Reweight(Edit):
    """`A <- A * c` on the columns of text tokens, by words.

    Args:
        weights: word of the Control → factor; 1 is neutral.
        branch: name of the prompt; all when None.
        normalize: whether rows of the map sum to 1 again, by `log c` on the logits (c > 0).
        both: in joint attention, whether words' queries count the grid's keys by their factor, too, and other text
            tokens keep their maps (DiTCtrl).
        where, schedule, guidance: sites, steps and rows.

    Raises:
        ValueError: a factor that is not above 0 with normalize.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        branch: str | None = None,
        normalize: bool = False,
        both: bool = False,
        where: Where | None = None,
        schedule: Schedule | None = None,
        guidance: str = "cond",
    ):
        if normalize and min(weights.values(), default=1) <= 0:
            raise ValueError(f"weights={dict(weights)} must be above 0 when rows are normalized")
        if both and normalize:
            raise ValueError("both=True is for maps that are not normalized again, normalize=True")
        self.weights, self.branch, self.normalize, self.both = dict(weights), branch, normalize, both
        self.where, self.schedule = where or Where(kinds=("cross", "joint")), schedule or Schedule()
        self.guidance, self.words = guidance, tuple(weights)
        self.branches = () if branch is None else (branch,)

    def plan(self, context: Context) -> tuple | None:
        if all(weight == 1 for weight in self.weights.values()):
            return None
        return context, context.rows.of(self.branch, self.guidance)

    def _factor(self, call: Call, context: Context) -> Tensor | None:
        span = context.span(call, "text", keys=True)
        if span is None:
            return None
        factor = torch.ones(call.key.shape[1], device=call.query.device)
        for word, weight in self.weights.items():
            factor[context.places_of([word], span)] = weight
        return factor

    def qkv(self, call: Call, plan: tuple) -> Call:
        context, rows = plan
        if not self.normalize or (factor := self._factor(call, context)) is None:
            return call
        chosen = torch.zeros(context.rows.batch, 1, 1, 1, device=call.query.device)
        chosen[list(rows)] = 1
        chosen = chosen.repeat_interleave(call.query.shape[0] // context.rows.batch, dim=0)
        return with_bias(call, chosen, factor.log()[:, None, None])

    def edit_terms(self, terms: list[Term], call: Call, plan: tuple) -> list[Term]:
        context, rows = plan
        if self.normalize or (factor := self._factor(call, context)) is None:
            return terms
        mine, others = take(terms, rows)
        return others + [term.times(factor) for term in mine]

    def out(self, call: Call, plan: tuple, out: Tensor) -> Tensor:
        context, rows = plan
        text, grid = context.span(call, "text", keys=False), context.span(call, "image", keys=True)
        if not self.both or text is None or grid is None:
            return out
        index = torch.tensor(rows, device=out.device)
        mask = call.mask
        if mask is not None and mask.dim() >= 3 and mask.shape[0] == call.query.shape[0]:
            mask = mask[index]
        part = replace(call, query=call.query[index], key=call.key[index], value=call.value[index], mask=mask)
        out = out.clone()
        out[index, text[0] : text[1]] = self._queries(part, slice(*text), part.value)
        for word, weight in self.weights.items():
            value = part.value.clone()
            value[:, grid[0] : grid[1]] *= weight
            for at in context.places_of([word], text):
                out[index, at : at + 1] = self._queries(part, slice(at, at + 1), value)
        return out

    def _queries(self, call: Call, tokens: slice, value: Tensor) -> Tensor:
        """Plain attention of some queries."""
        mask = call.mask
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., tokens, :]
        return replace(call, query=call.query[:, tokens], value=value, mask=mask).dense()
