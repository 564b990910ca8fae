"""Words that count more or less: columns of the map times a factor."""

from __future__ import annotations

from collections.abc import Mapping

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
        rows: queries that are edited: "all", or "image" for those of the grid alone.
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
        where: Where | None = None,
        schedule: Schedule | None = None,
        guidance: str = "cond",
    ):
        if normalize and min(weights.values(), default=1) <= 0:
            raise ValueError(f"weights={dict(weights)} must be above 0 when rows are normalized")
        self.weights, self.branch, self.normalize = dict(weights), branch, normalize
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
            tokens = [span[0] + token for token in context.words[word]]
            if max(tokens) >= span[1]:
                raise ValueError(f"word {word!r} is token {max(tokens) - span[0]} of {span[1] - span[0]} text tokens")
            factor[tokens] = weight
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
