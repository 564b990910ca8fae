"""Queries, keys or values of one run, kept for another: structure from a reference image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...sites import Call, Schedule
from ..edit import PARTS, Context, Edit
from ..where import Where


class Keep(Edit):
    """Keeps queries, keys or values of the grid's tokens, site by site; changes nothing.

    Args:
        what: letters of "qkv".
        home: device where they are kept.
        where, schedule: sites and steps; a later step replaces an earlier one.

    Attributes:
        bank: (path of the site, letter) → `[B, tokens, heads, d]`.
    """

    guidance = "both"

    def __init__(
        self,
        what: str = "q",
        *,
        home: str | torch.device | None = None,
        where: Where | None = None,
        schedule: Schedule | None = None,
    ):
        if not what or set(what) - set(PARTS):
            raise ValueError(f"what={what!r} must be letters of 'qkv'")
        self.what, self.home, self.bank = what, home, {}
        self.where, self.schedule = where or Where(kinds=("self", "joint")), schedule or Schedule()

    def qkv(self, call: Call, plan: Context) -> Call:
        for letter in self.what:
            x = getattr(call, PARTS[letter])
            span = plan.span(call, "image", keys=letter != "q")
            if span is not None:
                x = x[:, span[0] : span[1]].detach()
                self.bank[call.site.path, letter] = x.clone() if self.home is None else x.to(self.home)
        return call

    @property
    def bytes(self) -> int:
        """Memory of the bank."""
        return sum(x.nbytes for x in self.bank.values())


class Recall(Edit):
    """Puts what a `Keep` holds in the place of the grid's queries, keys or values.

    Args:
        kept: a `Keep` that ran.
        what: letters of "qkv"; those of the `Keep` when None.
        where, schedule, guidance: sites, steps and rows.
    """

    def __init__(
        self,
        kept: Keep,
        what: str | None = None,
        *,
        where: Where | None = None,
        schedule: Schedule | None = None,
        guidance: str = "both",
    ):
        self.kept, self.what = kept, what or kept.what
        self.where, self.schedule, self.guidance = where or kept.where, schedule or Schedule(), guidance

    def plan(self, context: Context) -> Any:
        if not self.kept.bank:
            raise ValueError("Recall found nothing kept: run the model once under a Control with the Keep")
        return context, context.rows.of(None, self.guidance)

    def qkv(self, call: Call, plan: Any) -> Call:
        context, rows = plan
        changes = {}
        for letter in self.what:
            x, theirs = getattr(call, PARTS[letter]), self.kept.bank.get((call.site.path, letter))
            span = context.span(call, "image", keys=letter != "q")
            if theirs is None or span is None:
                continue
            changes[PARTS[letter]] = self._put(x, theirs, span, rows)
        return replace(call, **changes)

    def _put(self, x: Tensor, theirs: Tensor, span: tuple[int, int], rows: tuple[int, ...]) -> Tensor:
        if theirs.shape[1] != span[1] - span[0]:
            raise ValueError(f"the kept run had {theirs.shape[1]} tokens, this one {span[1] - span[0]}: use one size")
        x = x.clone()
        theirs = theirs.to(x)
        x[list(rows), span[0] : span[1]] = theirs if len(theirs) == len(rows) else theirs[-1:]
        return x
