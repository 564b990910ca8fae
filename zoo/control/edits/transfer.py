"""Cross-attention maps of one prompt in the place of another's: swapped, refined, for some steps, word by word."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...sites import Call, Schedule
from ..edit import Context, Edit
from ..terms import Term, copy_terms, take
from ..where import Where


class Transfer(Edit):
    """`A_target <- A_source @ right + A_target * keep`, on the columns of text tokens (Prompt-to-Prompt, 2208.01626).

    Nothing is renormalized, as in the official code. The map is never made: `right @ V` and `keep * V` are attended to.

    Args:
        right: factor on the source's map by step, `step → [tokens, tokens]`, `[tokens]` or None for "not in this step".
        keep: factor on the target's own map by step, `step → [tokens]`, or None for nothing of it.
        source, target: names of the branches.
        where, schedule, guidance: sites, steps and rows.
    """

    def __init__(
        self,
        right: Callable[[int], Tensor | None],
        keep: Callable[[int], Tensor | None],
        *,
        source: str = "source",
        target: str = "target",
        where: Where | None = None,
        schedule: Schedule | None = None,
        guidance: str = "cond",
    ):
        self.right, self.keep, self.source, self.target = right, keep, source, target
        self.where, self.schedule = where or Where(kinds=("cross",)), schedule or Schedule()
        self.guidance, self.branches = guidance, (source, target)

    def plan(self, context: Context) -> tuple | None:
        step = context.moment.step or 0
        right = self.right(step)
        if right is None:
            return None
        rows = context.rows
        return (right, self.keep(step), rows.of(self.source, self.guidance), rows.of(self.target, self.guidance))

    def edit_terms(self, terms: list[Term], call: Call, plan: tuple) -> list[Term]:
        right, keep, source, target = plan
        tokens = call.key.shape[1]
        for factor in (right, keep):
            if factor is not None and factor.shape[-1] != tokens:
                raise ValueError(
                    f"{call.site.path} attends to {tokens} text tokens; the alignment is of {factor.shape[-1]}: give "
                    f"length={tokens}"
                )
        mine, others = take(terms, target)
        theirs, _ = take(terms, source)
        device = call.query.device
        moved = [term.times(right.to(device)) for term in copy_terms(theirs, source, target)]
        kept = [] if keep is None else [term.times(keep.to(device)) for term in mine]
        return others + moved + kept


def alignment(right: Tensor, alpha: Tensor | None, times: Tensor) -> tuple[Callable, Callable]:
    """Factors by step of `Transfer` from an alignment and the steps of each token.

    With `t` the row of a step of times, the map is `t (A_source @ right + (1 - alpha) A_target) + (1 - t) A_target`.

    Args:
        right: `[source tokens, target tokens]`, columns of unmatched tokens anything.
        alpha: 1 for target tokens with a match, `[tokens]`; None for all.
        times: `[steps + 1, tokens]`, in 0..1.
    """

    def row(step: int) -> Tensor:
        return times[min(step, len(times) - 1)]

    def factor(step: int) -> Tensor | None:
        now = row(step) if alpha is None else row(step) * alpha
        return None if not bool(now.any()) else right * now

    def keep(step: int) -> Tensor | None:
        now = 1 - (row(step) if alpha is None else row(step) * alpha)
        return None if not bool(now.any()) else now

    return factor, keep


def gather_map(mapper: Tensor) -> Tensor:
    """The matrix `[tokens, tokens]` that takes column `mapper[j]` of the source to column j; none where it is -1."""
    matrix = torch.zeros(len(mapper), len(mapper))
    found = mapper >= 0
    matrix[mapper[found], torch.arange(len(mapper))[found]] = 1
    return matrix
