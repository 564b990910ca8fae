"""Whole self-attention maps, for losses on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...sites import Call, Schedule
from ...sites.site import Site
from ..channels import logits, scale_of
from ..edit import Context, Edit
from ..where import Where


class SelfMaps(Edit):
    """Keeps the self-attention maps of small grids, in the graph of gradients; changes nothing.

    Args:
        most: tokens of the largest grid whose maps are made.
        where, schedule, guidance: sites, steps and rows.

    Attributes:
        found: path of a site → `[rows, heads, tokens, tokens]` of the last forward.
    """

    needs = "losses on whole self-attention maps"

    def __init__(
        self,
        *,
        most: int = 1024,
        where: Where | None = None,
        schedule: Schedule | None = None,
        guidance: str = "cond",
    ):
        self.most, self.guidance = most, guidance
        self.where, self.schedule = where or Where(kinds=("self",)), schedule or Schedule()
        self.found: dict[str, Tensor] = {}

    def sites(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in super().sites(sites) if site.axes is None]

    def begin(self) -> None:
        self.found = {}

    def plan(self, context: Context) -> tuple | None:
        return context, context.rows.of(None, self.guidance)

    @torch.compiler.disable
    def qkv(self, call: Call, plan: tuple) -> Call:
        _, rows = plan
        if call.query.shape[1] == call.key.shape[1] <= self.most:
            index = torch.tensor(rows, device=call.query.device)
            self.found[call.site.path] = logits(call.query[index], call.key[index], scale_of(call)).softmax(-1)
        return call
