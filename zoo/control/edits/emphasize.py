"""A word that everybody reads: a constant added to its column of the map."""

from __future__ import annotations

from torch import Tensor

from ...sites import Call, Schedule
from ..edit import Context, Edit
from ..where import Where


class Emphasize(Edit):
    """`A[:, word] += amount`, so the output gains `amount * V_word` for each of its tokens (MotionCLR).

    Args:
        word: of the Control.
        amount: added to the map; 0 is neutral.
        branch: name of the prompt; all when None.
        where, schedule, guidance: sites, steps and rows.
    """

    def __init__(
        self,
        word: str,
        amount: float,
        *,
        branch: str | None = None,
        where: Where | None = None,
        schedule: Schedule | None = None,
        guidance: str = "cond",
    ):
        self.amount, self.words, self.branch = amount, (word,), branch
        self.where, self.schedule = where or Where(kinds=("cross", "joint")), schedule or Schedule()
        self.guidance, self.branches = guidance, () if branch is None else (branch,)

    def plan(self, context: Context) -> tuple | None:
        return None if self.amount == 0 else (context, context.rows.of(self.branch, self.guidance))

    def out(self, call: Call, plan: tuple, out: Tensor) -> Tensor:
        context, rows = plan
        span = context.span(call, "text", keys=True)
        if span is None:
            return out
        tokens = context.places_of(self.words, span)
        added = self.amount * call.value[:, tokens].sum(1, keepdim=True)  # [B, 1, heads, d]
        out = out.clone()
        out[list(rows)] += added[list(rows)]
        return out
